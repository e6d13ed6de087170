"""COCO-format data sets: read from a folder as people have them, and written for other programs to read."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from minidet.data.annotations import Annotations
from minidet.data.index import indexed
from minidet.data.refusal import DataError
from minidet.data.sample import Dataset, Sample
from minidet.images import ImageError, open_image


class CocoDataset:
    """The images and boxes of one COCO json file; see `coco`."""

    def __init__(self, path: Path, annotations: Annotations, folder: Path) -> None:
        self.path, self.annotations, self.folder = path, annotations, folder
        self.classes = tuple(annotations.categories.values())
        self.category_ids = tuple(annotations.categories)
        self.unrotated: set[int] = set()
        """Ids of the images, of those opened so far, whose boxes ignore the EXIF orientation."""

    def __len__(self) -> int:
        return len(self.annotations.names)

    def __repr__(self) -> str:
        return f"coco({str(self.path)!r})"

    def __getitem__(self, index: int) -> Sample:
        found = self.annotations
        if not 0 <= index < len(self):
            raise IndexError(f"{self!r} has no image {index}")
        rows = np.arange(found.starts[index], found.starts[index + 1])
        rows = rows[found.learnable[rows]]
        return Sample(
            self._open(index), found.boxes[rows], found.labels[rows], int(found.image_ids[index]), found.names[index]
        )

    @property
    def sizes(self) -> np.ndarray:
        """H and W of every image, as annotated, (N, 2)."""
        return self.annotations.sizes

    def size(self, index: int) -> tuple[int, int]:
        """(H, W) of image `index`, as annotated."""
        h, w = self.annotations.sizes[index].tolist()
        return h, w

    def ground_truth(self) -> dict[str, Any]:
        """The file for an evaluator: crowds included."""
        return self.annotations.ground_truth()

    def summary(self) -> str:
        """What was found, in a few lines."""
        found = self.annotations
        counts = np.bincount(found.labels[found.learnable], minlength=len(self.classes))
        lines = [
            f"{self.path}: {len(self)} images ({np.count_nonzero(np.diff(found.starts) == 0)} without objects), "
            f"{counts.sum()} boxes of {len(self.classes)} classes, {found.crowd.sum()} crowds left out of "
            f"training, {found.clipped} boxes clipped to their image"
        ]
        if empty := np.count_nonzero(~found.learnable & ~found.crowd):
            lines.append(f"{empty} boxes without area left out of training")
        unused = [name for name, count in zip(self.classes, counts, strict=True) if count == 0]
        if unused:
            lines.append(f"without a box: {', '.join(unused)}")
        if self.unrotated:
            lines.append(f"{len(self.unrotated)} images used without their EXIF orientation, as annotated")
        return "\n".join(lines)

    def _open(self, index: int) -> np.ndarray:
        """The image upright; or as it is stored, if only then it has the size it was annotated in."""
        file, size = self.folder / self.annotations.names[index], self.size(index)
        image = open_image(file)
        if image.shape[:2] == size:
            return image
        stored = open_image(file, upright=False)
        image_id = int(self.annotations.image_ids[index])
        if stored.shape[:2] == size:
            self.unrotated.add(image_id)
            return stored
        raise ImageError(
            f"{file} is {image.shape[1]} x {image.shape[0]}, but {self.path} annotates image id {image_id} "
            f"as {size[1]} x {size[0]}: was the image resized after it was annotated?"
        )


def coco(
    path: str | Path,
    split: str = "train",
    *,
    images: str | Path | None = None,
    overhang: float = 2.0,
) -> CocoDataset:
    """The data set in a folder, or of one json file.

    A folder holds annotations/instances_SPLIT.json, and the images in images/, SPLIT2017/, SPLIT/, either of
    these inside images/, or beside annotations/; `images` names another place.  Boxes that stick out of their
    image by up to `overhang` pixels are clipped; beyond that they are an error.

    Raises:
        DataError: if a file is missing, or the json malformed or contradictory.
    """
    path = Path(path)
    if path.is_file():
        file = path
        root = path.parent.parent if path.parent.name == "annotations" else path.parent
        split = path.stem.removeprefix("instances_").removesuffix("2017")
    else:
        file, root = annotation_file(path, split), path
    annotations = indexed(file, overhang)
    places = [Path(images)] if images else image_places(root, split)
    return CocoDataset(file, annotations, _image_folder(file, annotations, places))


def annotation_file(root: Path, split: str) -> Path:
    """The json of a split.

    Raises:
        DataError: if the folder has none; it says which splits there are.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such file or folder")
    for name in (f"instances_{split}.json", f"instances_{split}2017.json"):
        if (root / "annotations" / name).is_file():
            return root / "annotations" / name
    splits = sorted(file.stem.removeprefix("instances_") for file in root.glob("annotations/instances_*.json"))
    hint = f"it has the splits {', '.join(splits)}" if splits else "is it a data set in COCO's layout?"
    raise DataError(f"{root}: no annotations/instances_{split}.json; {hint}")


def image_places(root: Path, split: str) -> list[Path]:
    """Where the images of a split may lie."""
    inner = (f"{split}2017", split)
    return [
        *(root / "images" / name for name in inner), root / "images", *(root / name for name in inner), root
    ]  # fmt: skip


def _image_folder(file: Path, found: Annotations, places: list[Path]) -> Path:
    """The first place that holds every image; one that misses some is reported before training, not in it."""
    fewest, missing = None, range(len(found.names))
    for place in filter(Path.is_dir, places):
        # A folder is read once; only what was not seen in it is asked for by name.
        listed = {entry.name for entry in os.scandir(place) if entry.is_file()}
        absent = [
            n for n, name in enumerate(found.names) if name not in listed and not os.path.isfile(f"{place}/{name}")
        ]
        if not absent:
            return place
        if len(absent) < len(missing):
            fewest, missing = place, absent
    looked = fewest or ", ".join(map(str, places))
    raise DataError(
        f"{file}: {len(missing)} of its {len(found.names)} images are missing; looked for "
        f"{found.names[missing[0]]} (image id {found.image_ids[missing[0]]}) in {looked}"
    )


def write_coco(dataset: Dataset, folder: str | Path, split: str) -> Path:
    """Write FOLDER/annotations/instances_SPLIT.json and one png an image below FOLDER/images; the json's path.

    What `coco` reads back is the same, pixel by pixel.

    Raises:
        DataError: if that json is there already: it may be somebody's work.
    """
    folder = Path(folder)
    file = folder / "annotations" / f"instances_{split}.json"
    if file.exists():
        raise DataError(f"{file} is there already: choose another folder or remove it")
    file.parent.mkdir(parents=True, exist_ok=True)
    truth = dataset.ground_truth()
    entries = []
    for index, entry in enumerate(truth["images"]):
        name = str(PurePosixPath(entry["file_name"]).with_suffix(".png"))
        target = folder / "images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # The least compression: noise does not compress, and trying takes most of the time.
        Image.fromarray(np.ascontiguousarray(dataset[index].image)).save(target, compress_level=1)
        entries.append({**entry, "file_name": name})
    # Last, so that a folder with a json is a folder with its images.
    file.write_text(json.dumps({"info": {"description": repr(dataset)}, **truth, "images": entries}))
    return file
