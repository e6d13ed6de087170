"""Pascal VOC's annotations, an xml an image, as COCO's json, one a split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from minidet.data.refusal import DataError

SIDES = ("xmin", "ymin", "xmax", "ymax")
THINNEST = 2
"""Boxes with a side of fewer pixels are slips of the mouse."""


def write_voc_as_coco(
    voc: Path, folder: Path, classes: Sequence[str], splits: Sequence[str], info: dict[str, Any]
) -> int:
    """Write FOLDER/instances_SPLIT.json from VOC's Annotations and ImageSets/Main; returns how many boxes it left out.

    Left out are those thinner than THINNEST; what sticks out of the image is clipped.  Ids count from 1 over all
    splits, images and boxes in the order of the lists and the xml.

    Units: width is xmax - xmin, as the boxes were drawn: VOC's own "+ 1" belongs to whole pixels.
    Raises:
        DataError: if an xml is missing, malformed, or names another class.
    """
    images, boxes, left_out = 0, 0, 0
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        data = {"info": info, "images": [], "annotations": []}
        for name in (voc / "ImageSets" / "Main" / f"{split}.txt").read_text().split():
            images += 1
            file_name, width, height, objects = _read(voc / "Annotations" / f"{name}.xml", classes)
            data["images"].append({"id": images, "file_name": file_name, "width": width, "height": height})
            for label, (x1, y1, x2, y2) in objects:
                x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)
                if not (x2 - x1 >= THINNEST and y2 - y1 >= THINNEST):  # NaN included
                    left_out += 1
                    continue
                boxes += 1
                data["annotations"].append({
                    "id": boxes, "image_id": images, "category_id": label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0,
                })  # fmt: skip
        data["categories"] = [{"id": k + 1, "name": name} for k, name in enumerate(classes)]
        (folder / f"instances_{split}.json").write_text(json.dumps(data))
    return left_out


def _read(path: Path, classes: Sequence[str]) -> tuple[str, int, int, list[tuple]]:
    """File name, width, height, and label and corners of every object."""
    try:
        text = path.read_bytes()
        if b"<!" in text:
            raise ValueError("it declares entities, which annotations do not need")
        root = ElementTree.fromstring(text)
        width, height = (int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        things = list(root.iter("object"))
        names = [thing.findtext("name", "") for thing in things]
        if unknown := set(names) - set(classes):
            raise ValueError(f"it names {unknown.pop()!r}")
        labels = [classes.index(name) for name in names]
        corners = [[float(thing.findtext(f"bndbox/{side}", "")) for side in SIDES] for thing in things]
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise DataError(f"{path}: no VOC annotation of the classes {', '.join(classes)}: {error}") from error
    return path.with_suffix(".jpg").name, width, height, list(zip(labels, corners, strict=True))
