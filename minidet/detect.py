"""From a model and pictures to detections in the pictures' own pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from minidet.autograd import Tensor, no_grad
from minidet.backend import Array
from minidet.detection import Detections, PostprocessConfig, postprocess
from minidet.images import open_image, pad_batch
from minidet.models import RetinaNet
from minidet.plots import draw_boxes


@dataclass(frozen=True, eq=False, repr=False)
class Found:
    """The detections of one picture, best score first.

    Shapes:
        image: (H, W, 3)
        boxes: (D, 4)
        scores: (D,)
        labels: (D,)
    Units: image uint8 RGB; boxes x1, y1, x2, y2 in pixels of that image; labels number `classes`.
    """

    image: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str = ""

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        counts = {name: int((self.labels == k).sum()) for k, name in enumerate(self.classes)}
        what = ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "nothing"
        return f"Found({what} in {self.name or 'an image'} of {width} x {height})"

    def draw(self, *, threshold: float = 0.3) -> Image.Image:
        """The picture with a box, a name and a score on everything that scores above `threshold`."""
        keep = self.scores > threshold
        return Image.fromarray(
            draw_boxes(self.image, self.boxes[keep], self.labels[keep], self.scores[keep], self.classes)
        )

    def to_json(self) -> dict:
        """The same as plain numbers: {"image", "width", "height", "detections": [{"box", "label", "score"}]}."""
        height, width = self.image.shape[:2]
        rows = zip(self.boxes.tolist(), self.labels.tolist(), self.scores.tolist(), strict=True)
        return {
            "image": self.name,
            "width": width,
            "height": height,
            "detections": [
                {"box": [round(v, 2) for v in box], "label": self.classes[label], "score": round(score, 4)}
                for box, label, score in rows
            ],
        }


    def json_text(self) -> str:
        """`to_json` as text, a line for each detection."""
        head = self.to_json()
        lines = ",\n".join(f"  {json.dumps(detection)}" for detection in head.pop("detections"))
        return f'{json.dumps(head)[:-1]}, "detections": [\n{lines}\n]}}\n'


Picture = str | Path | np.ndarray


def detect(model: RetinaNet, pictures: Picture | Sequence[Picture]) -> Found | list[Found]:
    """Find the objects in a picture, or in each of several.

    A picture is a path, or uint8 RGB (H, W, 3).  One gives one `Found`, a sequence a list.

    Raises:
        ImageError: for a file that is not an image, by name.
        ValueError: for an array that is not an RGB image.
    """
    if isinstance(pictures, str | Path | np.ndarray):
        return detect(model, [pictures])[0]
    found = []
    for picture in pictures:
        named = isinstance(picture, str | Path)
        image = open_image(picture) if named else picture
        prepared = model.config.preprocess.prepare(image)
        batch, sizes = pad_batch([prepared], model.config.preprocess.pad_multiple)
        (detections,) = detect_batch(model, batch, sizes, [image.shape[:2]])
        found.append(
            Found(
                image,
                detections.boxes,
                detections.scores,
                detections.labels,
                model.config.classes,
                str(picture) if named else "",
            )
        )
    return found


def detect_batch(
    model: RetinaNet,
    images: Array,
    sizes: Sequence[tuple[int, int]],
    original_sizes: Sequence[tuple[int, int]],
    config: PostprocessConfig | None = None,
) -> list[Detections]:
    """The detections of a prepared batch, in pixels of the original images, by `config` or the model's own.

    Batch norms use their running statistics, whatever mode the model is in; the mode is left as it was.

    Shapes:
        images: (N, H, W, 3), normalised and padded, on the host or where the model is
        sizes: (N, 2), of each image without padding
        original_sizes: (N, 2), before it was resized
    Source: RetinaNet, arXiv:1708.02002, section 4.1 "Inference".
    """
    xp, config = model.xp, config or model.config.postprocess
    modes = [(module, module.training) for _, module in model.named_modules() if hasattr(module, "training")]
    try:
        for module, _ in modes:
            module.training = False
        with no_grad():
            logits, deltas = model(Tensor(xp.asarray(images)))
    finally:
        for module, mode in modes:
            module.training = mode
    H, W = images.shape[1:3]
    detections = postprocess(
        logits.data,
        deltas.data,
        model.anchors(H, W, xp),
        model.level_counts(H, W),
        [tuple(int(v) for v in size) for size in sizes],
        config,
        model.config.coder,
    )
    back = model.config.preprocess.boxes_back
    return [
        Detections(back(d.boxes, tuple(size), tuple(original)), d.scores, d.labels)
        for d, size, original in zip(detections, sizes, original_sizes, strict=True)
    ]
