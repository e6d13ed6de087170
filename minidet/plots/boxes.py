"""Boxes drawn on pictures, and sheets of pictures: arrays in, pixels out, without matplotlib."""

from __future__ import annotations

import colorsys
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]

SMALLEST_DRAWING = 384
"""Pixels of the longer side; smaller images are enlarged, or labels would hide what they name."""

COLOURS = ("#1f77ff", "#ff8c00", "#12b347", "#d62ad0", "#e6194b", "#00b8c4", "#8a5cf6", "#c6e300")
"""Of the first classes; `colour_of` goes on from there.  Vivid, to stand out from photographs."""

INK = "#222222"


def colour_of(label: int) -> str:
    """A colour for class `label`, a different one for each."""
    if label < len(COLOURS):
        return COLOURS[label]
    # Steps of the golden ratio around the hue circle never meet an earlier step.
    hue, light = (label * 0.618034) % 1, (0.42, 0.55, 0.68)[label % 3]
    return "#" + "".join(f"{round(255 * c):02x}" for c in colorsys.hls_to_rgb(hue, light, 0.85))


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray | None,
    class_names: Sequence[str],
    *,
    truth: np.ndarray | None = None,
    texts: Sequence[str] | None = None,
    size: int | None = None,
) -> np.ndarray:
    """A copy of the image with each box outlined and named in the colour of its class.

    `texts` stand in place of class and score; where one is empty, nothing is written.

    Shapes:
        image: (H, W, 3) uint8
        boxes: (D, 4) x1, y1, x2, y2
        labels: (D,) positions in class_names
        scores: (D,) or None, which leaves them out
        truth: (G, 4) boxes to dash in white
        returns: (H, W, 3) uint8, enlarged or reduced so that the longer side is `size`; without `size`,
            at least SMALLEST_DRAWING
    Units: boxes in pixels of `image`.
    Raises:
        ValueError: if boxes, labels and scores differ in number or a label has no name.
    """
    _check_boxes(boxes, labels, scores, class_names)
    H, W = image.shape[:2]
    scale = (size or max(H, W, SMALLEST_DRAWING)) / max(H, W)
    picture = Image.fromarray(image)
    if scale != 1:
        sides = max(1, round(W * scale)), max(1, round(H * scale))  # a line of pixels stays one
        picture = picture.resize(sides, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture, "RGBA")
    line = max(2, round(max(picture.size) / 320))
    best_first = range(len(boxes)) if scores is None else np.argsort(-np.asarray(scores), kind="stable")
    boxes = np.asarray(boxes, np.float64) * scale
    for n in reversed(best_first):  # the best is drawn last, on top
        draw.rectangle(_inside(boxes[n], picture.size), outline=colour_of(int(labels[n])), width=line)
    for box in [] if truth is None else np.asarray(truth, np.float64) * scale:
        _dash(draw, _inside(box, picture.size), max(1, line // 2))
    font, placed = _font(max(11, round(max(picture.size) / 42))), []
    for n in best_first:
        name = str(class_names[int(labels[n])])
        text = name if scores is None else f"{name} {float(scores[n]):.2f}"
        text = text if texts is None else texts[n]
        if text:
            _name(draw, text, boxes[n], colour_of(int(labels[n])), font, picture.size, placed)
    return np.asarray(picture)


def save_image(image: np.ndarray, path: str | Path) -> Path:
    """Write (H, W, 3) uint8 pixels in the format the suffix names, making folders as needed."""
    path = ready(path)
    Image.fromarray(image).save(path, compress_level=4)  # of PNG: the default, 6, takes twice as long and saves nothing
    return path


def contact_sheet(
    images: Sequence[np.ndarray], titles: Sequence[str], path: str | Path, *, columns: int = 4, caption: str = ""
) -> Path:
    """Write images in rows, a title above each, a caption below all; what is too long ends in "...".

    Shapes:
        images: list of (H, W, 3) uint8; sizes may differ, columns are as wide as the widest
    Raises:
        ValueError: if there are no images, or not one title for each.
    """
    if not len(images) or len(images) != len(titles):
        raise ValueError(f"contact_sheet: {len(images)} images and {len(titles)} titles; needs one of each")
    width = max(image.shape[1] for image in images)
    gap, font = max(8, width // 40), _font(max(12, width // 28))
    head = round(1.7 * font.size)
    columns = min(columns, len(images))
    rows = [images[n : n + columns] for n in range(0, len(images), columns)]
    heights = [head + gap + max(image.shape[0] for image in row) for row in rows]
    foot = gap + (head if caption else 0)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, sum(heights) + foot), "white")
    draw = ImageDraw.Draw(sheet)
    shown = _shortened(caption, font, sheet.width - 2 * gap)
    draw.text((gap, sheet.height - foot / 2), shown, fill=INK, font=font, anchor="lm")
    for n, (image, title) in enumerate(zip(images, titles, strict=True)):
        x, y = gap + n % columns * (width + gap), gap + sum(heights[: n // columns])
        draw.text((x, y + head * 0.4), _shortened(title, font, width), fill=INK, font=font, anchor="lm")
        sheet.paste(Image.fromarray(image), (x, y + head))
    return save_image(np.asarray(sheet), path)


def _check_boxes(boxes, labels, scores, class_names) -> None:
    counts = (len(boxes), len(labels), len(labels if scores is None else scores))
    if len(set(counts)) > 1:
        raise ValueError("draw_boxes: got {} boxes, {} labels and {} scores".format(*counts))
    unknown = [int(k) for k in labels if not 0 <= k < len(class_names)]
    if unknown:
        raise ValueError(f"draw_boxes: label {unknown[0]} has no name among {len(class_names)} classes")


def _inside(box: np.ndarray, size: tuple[int, int]) -> Box:
    """The box with its edges moved onto the picture, so that all four sides are seen."""
    width, height = size
    x1, x2 = sorted(float(np.clip(v, 0, width - 1)) for v in box[0::2])
    y1, y2 = sorted(float(np.clip(v, 0, height - 1)) for v in box[1::2])
    return x1, y1, x2, y2


def _dash(draw: ImageDraw.ImageDraw, box: Box, width: int) -> None:
    """White dashes over a black line: seen on light and on dark."""
    x1, y1, x2, y2 = box
    draw.rectangle(box, outline=(0, 0, 0, 100), width=width)
    dash = 4 * width + 1
    for a in np.arange(x1, x2, 2 * dash):
        for y in (y1, y2):
            draw.line((a, y, min(a + dash, x2), y), fill="white", width=width)
    for b in np.arange(y1, y2, 2 * dash):
        for x in (x1, x2):
            draw.line((x, b, x, min(b + dash, y2)), fill="white", width=width)


def _name(draw, text: str, box: np.ndarray, colour: str, font, size: tuple[int, int], placed: list[Box]):
    """Write `text` where it hides least of the box and of the labels `placed` before; add it to them."""
    box = x1, y1, x2, y2 = _inside(box, size)
    width, height = draw.textlength(text, font=font) + 0.5 * font.size, 1.25 * font.size
    corners = [(x1, y1 - height), (x1, y2), (x2 - width, y1 - height), (x1, y1), (x2 - width, y2)]
    spots = []
    for x, y in corners:
        x, y = np.clip(x, 0, max(0, size[0] - width)), np.clip(y, 0, max(0, size[1] - height))
        spots.append((float(x), float(y), float(x + width), float(y + height)))
    spot = min(spots, key=lambda s: sum(_covered(b, s) for b in (box, *placed)))
    placed.append(spot)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
    draw.rectangle(spot, fill=colour)
    draw.text((spot[0] + 0.25 * font.size, (spot[1] + spot[3]) / 2), text, fill=ink, font=font, anchor="lm")


def _covered(a: Box, b: Box) -> float:
    """The part of `a` that lies under `b`."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height) / max(1.0, (a[2] - a[0]) * (a[3] - a[1]))


def _font(pixels: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: the same letters on every machine."""
    (package,) = importlib.util.find_spec("matplotlib").submodule_search_locations
    return ImageFont.truetype(f"{package}/mpl-data/fonts/ttf/DejaVuSans.ttf", pixels)


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def ready(path: str | Path) -> Path:
    """The path, once its folder is there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)
