"""Ways in which people's data sets are wrong: each takes a sound folder in COCO's layout and spoils it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from minidet.data import shapes, write_coco

WIDTH, HEIGHT = 160, 128


def sound_folder(folder: Path) -> Path:
    """24 and 8 pictures of 160 x 128 pixels with shapes, without a mistake."""
    for split, images in (("train", 24), ("val", 8)):
        file = write_coco(shapes(split, images=images, size=HEIGHT), folder, split)
        for name in (entry["file_name"] for entry in json.loads(file.read_text())["images"]):
            wider = Image.new("RGB", (WIDTH, HEIGHT), "grey")
            with Image.open(folder / "images" / name) as picture:
                wider.paste(picture)
            wider.save(folder / "images" / name)
        with edited(folder, split) as data:
            for entry in data.images:
                entry["width"] = WIDTH
    return folder


class edited:  # noqa: N801  a context manager, in lower case like those of the library
    """Inside, the lists of the split's json can be changed; afterwards they are written."""

    def __init__(self, folder: Path, split: str = "train"):
        self.folder, self.file = folder, folder / "annotations" / f"instances_{split}.json"

    def __enter__(self):
        self.data = json.loads(self.file.read_text())
        self.images, self.boxes, self.classes = (self.data[k] for k in ("images", "annotations", "categories"))
        return self

    def __exit__(self, *_):
        self.file.write_text(json.dumps(self.data))

    def picture(self, row: int) -> Path:
        return self.folder / "images" / self.images[row]["file_name"]


def each_box(change: Callable[[list[float]], list[float]], *, every: int = 1) -> Callable[[Path], None]:
    """Boxes changed by a function, areas left out."""

    def spoil(folder: Path) -> None:
        with edited(folder) as data:
            for entry in data.boxes[::every]:
                entry["bbox"] = change(entry["bbox"])
                del entry["area"]

    return spoil


def corners(box):
    x, y, w, h = box
    return [x, y, x + w, y + h]


def normalised(box):
    return (np.array(box) / [WIDTH, HEIGHT, WIDTH, HEIGHT]).tolist()


def centred(box):
    x, y, w, h = box
    return [x + w / 2, y + h / 2, w, h]


def leftwards(box):
    x, y, w, h = box
    return [x + w, y, -w, h]


def elongated(box):
    x, y, w, _ = box
    w = max(w, 60.0)
    return [min(x, WIDTH - w), y, w, w / 5]


def wrong_image_ids(folder):
    with edited(folder) as data:
        for entry in data.boxes:
            entry["image_id"] += 5000


def category_ids_from_0(folder):
    with edited(folder) as data:
        for entry in data.boxes:
            entry["category_id"] -= 1


def annotation_ids_twice(folder):
    with edited(folder) as data:
        for entry in data.boxes[10:]:
            entry["id"] -= 10


def image_ids_twice(folder):
    with edited(folder) as data:
        data.images.append(data.images[0] | {"file_name": data.images[1]["file_name"]})


def rotated_by_exif(folder):
    with edited(folder) as data:
        for row in range(5):
            path = data.picture(row).with_suffix(".jpg")
            exif = Image.Exif()
            exif[0x0112] = 6
            with Image.open(data.picture(row)) as picture:
                picture.save(path, exif=exif)
            data.images[row]["file_name"] = path.name


def missing_files(folder):
    with edited(folder) as data:
        for row in (3, 4):
            data.picture(row).unlink()


def truncated_image(folder):
    with edited(folder) as data:
        path = data.picture(7)
        path.write_bytes(path.read_bytes()[:5000])


def resized_images(folder):
    with edited(folder) as data:
        for row in range(6):
            with Image.open(data.picture(row)) as picture:
                half = picture.resize((WIDTH // 2, HEIGHT // 2))
            half.save(data.picture(row))


def sides_exchanged(folder):
    with edited(folder) as data:
        for entry in data.images:
            entry["width"], entry["height"] = entry["height"], entry["width"]
        data.boxes[:] = [e for e in data.boxes if e["bbox"][0] + e["bbox"][2] <= HEIGHT]


def renamed_class(folder):
    with edited(folder, "val") as data:
        data.classes[2]["name"] = "triangles"


def reordered_classes(folder):
    with edited(folder, "val") as data:
        names = [entry["name"] for entry in data.classes]
        for entry, name in zip(data.classes, sorted(names), strict=True):
            entry["name"] = name


def leaked_images(folder):
    with edited(folder) as data, edited(folder, "val") as val:
        for row in range(2):
            shutil.copy(data.picture(row), val.picture(row))


def copied_images(folder):
    with edited(folder) as data:
        shutil.copy(data.picture(0), data.picture(1))


def crowds_only(folder):
    with edited(folder) as data:
        for entry in data.boxes:
            entry["iscrowd"] = 1


def boxes_as_text(folder):
    with edited(folder) as data:
        for entry in data.boxes[:4]:
            entry["bbox"] = " ".join(map(str, entry["bbox"]))


def names_of_another_machine(folder):
    with edited(folder) as data:
        for entry in data.images:
            entry["file_name"] = f"/home/anna/{entry['file_name']}"


def truncated_json(folder):
    with edited(folder) as data:
        text = json.dumps(data.data)
    data.file.write_text(text[: len(text) // 2])


def boxes_twice(folder):
    with edited(folder) as data:
        data.boxes += [entry | {"id": entry["id"] + 10_000} for entry in data.boxes]


def class_without_boxes(folder):
    with edited(folder) as data, edited(folder, "val") as val:
        data.classes.append({"id": 99, "name": "unicorn"})
        val.classes.append({"id": 99, "name": "unicorn"})


def mirrored(box):
    x, y, w, h = box
    return [WIDTH - x - w, y, w, h]


def exchanged(box):
    x, y, w, h = box
    return [y, x, h, w]


def halved(box):
    return [value / 2 for value in box]


def doubled(box):
    return [value * 2 for value in box]


def of_1000(box):
    x, y, w, h = box
    return [x / WIDTH * 1000, y / HEIGHT * 1000, w / WIDTH * 1000, h / HEIGHT * 1000]


def whole(box):
    return [0, 0, WIDTH, HEIGHT]


def next_pictures(folder):
    with edited(folder) as data:
        names = [entry["file_name"] for entry in data.images]
        for entry, name in zip(data.images, names[1:] + names[:1], strict=True):
            entry["file_name"] = name


def strangers_pictures(folder):
    with edited(folder) as data:
        names = [entry["file_name"] for entry in data.images]
        for n, entry in enumerate(data.images):
            entry["file_name"] = names[(5 * n + 7) % len(names)]


def names_in_capitals(folder):
    with edited(folder) as data:
        for entry in data.images[:3]:
            entry["file_name"] = entry["file_name"].upper()


def other_suffixes(folder):
    with edited(folder) as data:
        for entry in data.images:
            entry["file_name"] = "train/" + entry["file_name"].replace(".png", ".jpg")


def dark_16_bits(folder):
    with edited(folder) as data:
        for row in range(4):
            with Image.open(data.picture(row)) as picture:
                grey = np.asarray(picture.convert("L"), np.uint16)
            Image.fromarray(grey).save(data.picture(row))


def scanned_map(folder):
    with edited(folder) as data:
        Image.new("1", (20_000, 20_000)).save(data.picture(0))


def areas_of_0(folder):
    with edited(folder) as data:
        for entry in data.boxes:
            entry["area"] = 0


def boxes_resized_alone(folder):
    with edited(folder) as data:
        for entry in data.boxes:
            entry["area"] = 4 * entry["bbox"][2] * entry["bbox"][3]


def labelled_twice(folder):
    with edited(folder) as data:
        data.boxes += [e | {"id": e["id"] + 1000, "category_id": e["category_id"] % 8 + 1} for e in data.boxes[:20]]


def one_class(folder):
    with edited(folder) as data:
        for entry in data.boxes[3:]:
            entry["category_id"] = 1


def a_crowd_in_words(folder):
    with edited(folder) as data:
        for entry in data.boxes[:3]:
            entry["iscrowd"] = "no"


@dataclass(frozen=True)
class Sabotage:
    """How to spoil a folder, and what must be said of it."""

    spoil: Callable[[Path], None]
    code: str
    severity: str
    count: int
    words: tuple[str, ...]
    """What sentence, places, cause and fix must contain between them."""
    also: tuple[str, ...] = ()
    """Other findings that necessarily follow."""


UNKNOWN = ("class-without-objects", "images-without-objects", "class-with-few-objects")
SABOTAGES = {
    "corners": Sabotage(each_box(corners), "boxes-are-corners", "must fix", 77, ("annotation id 1 of image id 1",
        "as x1, y1, x2, y2, not as x, y, width, height", "write [x1, y1, x2 - x1, y2 - y1]")),
    "normalised": Sabotage(each_box(normalised), "boxes-normalised", "must fix", 77, ("fractions", "YOLO",
        "multiply x and width by the image's width"), ("objects-too-small",)),
    "some normalised": Sabotage(each_box(normalised, every=9), "boxes-normalised", "must fix", 9, ("9 of 77 boxes",)),
    "centres": Sabotage(each_box(centred), "boxes-outside", "must fix", 9, ("centre x, centre y", "subtract half")),
    "negative sizes": Sabotage(each_box(leftwards, every=5), "boxes-negative", "must fix", 16, ("right to left",
        "x += width, width = -width")),
    "no area": Sabotage(each_box(lambda box: [*box[:3], 0], every=3), "boxes-empty", "must fix", 26, ("no area",
        "remove these annotations")),
    "wrong image ids": Sabotage(wrong_image_ids, "image-id-unknown", "must fix", 77, ("image id 5001",
        "json of another split", "remove these annotations"), UNKNOWN),
    "category ids from 0": Sabotage(category_ids_from_0, "category-id-unknown", "must fix", 15, (
        "counts from 0 where the entries count from 1", "add 1 to every category_id"), UNKNOWN),
    "annotation ids twice": Sabotage(annotation_ids_twice, "annotation-id-twice", "must fix", 10, ("put together",
        "number the annotations 1, 2, 3")),
    "image ids twice": Sabotage(image_ids_twice, "image-id-twice", "must fix", 1, ("image id 1 (",
        "number the images"), ("file-name-twice", "images-twice", "images-without-objects")),
    "tiny objects": Sabotage(each_box(lambda box: [box[0], box[1], 3, 3]), "objects-too-small", "must fix", 77, (
        "count as background", "smaller than 128 px²", "--set")),
    "elongated objects": Sabotage(each_box(elongated), "objects-too-elongated", "warning", 77, (
        "longer than 4.5 : 1", "--set 'model.anchors.ratios=")),
    "rotated by EXIF": Sabotage(rotated_by_exif, "exif-ignored", "warning", 5, ("EXIF orientation 6",
        "the annotation tool ignored EXIF", "rewrite them without EXIF")),
    "missing files": Sabotage(missing_files, "images-missing", "must fix", 2, ("train_000003.png", "put them back")),
    "truncated image": Sabotage(truncated_image, "images-unreadable", "must fix", 1, ("train_000007.png", "truncated",
        "copy it again")),
    "resized images": Sabotage(resized_images, "image-size-differs", "must fix", 6, ("the file is 80 x 64",
        "resized or cropped after", "new size / old size")),
    "width and height exchanged": Sabotage(sides_exchanged, "image-size-exchanged", "must fix", 24, (
        "128 x 160", "exchange width and height"), (*UNKNOWN, "images-without-objects")),
    "renamed class": Sabotage(renamed_class, "classes-differ", "must fix", 2, (
        "'triangles' may be 'triangle', renamed", "the same names and ids")),
    "reordered classes": Sabotage(reordered_classes, "classes-reordered", "must fix", 6, (
        "in the order circle, square, triangle")),
    "images in both splits": Sabotage(leaked_images, "images-in-two-splits", "must fix", 2, (
        "train_000000.png", "val_000000.png", "learned by heart")),
    "copies of an image": Sabotage(copied_images, "images-twice", "warning", 1, ("train_000001.png", "keep one")),
    "crowds only": Sabotage(crowds_only, "nothing-to-learn", "must fix", 24, ("77 crowds",
        "set iscrowd to 0"), UNKNOWN),
    "boxes as text": Sabotage(boxes_as_text, "entries-malformed", "must fix", 4, ("annotations id 1",
        "four finite numbers", "remove these entries"), UNKNOWN),
    "names of another machine": Sabotage(names_of_another_machine, "file-name-unsafe", "must fix", 24, (
        "/home/anna/train_000000.png", "below the image folder"), ("images-missing",)),
    "truncated json": Sabotage(truncated_json, "json-unreadable", "must fix", 1, ("instances_train.json", "cut off")),
    "boxes twice": Sabotage(boxes_twice, "boxes-twice", "warning", 77, ("77 of 154 boxes", "remove the copies")),
    "class without boxes": Sabotage(class_without_boxes, "class-without-objects", "warning", 1, ("unicorn",
        "not shown is not learned"), ("category-ids-sparse",)),
    "mirrored boxes": Sabotage(each_box(mirrored), "boxes-misread", "must fix", 23, (
        "would be mirrored left to right", "instances_train.json")),
    "x and y exchanged": Sabotage(each_box(exchanged), "boxes-misread", "must fix", 23, ("with x and y exchanged",)),
    "y1, x1, y2, x2": Sabotage(each_box(lambda box: exchanged(corners(box))), "boxes-are-corners", "must fix", 77, (
        "annotation id 1 of image id 1",)),
    "boxes of half the size": Sabotage(each_box(halved), "boxes-misread", "must fix", 23, ("would be multiplied by 2",),
        ("boxes-in-a-corner", "objects-too-small")),
    "per cent": Sabotage(each_box(lambda box: of_1000([v / 10 for v in box])), "boxes-in-a-corner", "warning", 77, (
        "upper 78%", "or in 0..100: per cent of the image"), ("boxes-fit-nothing", "objects-too-small")),
    "boxes of twice the size": Sabotage(each_box(doubled), "boxes-outside", "must fix", 58, (
        "of images at least 1.55 times as wide and 1.98 times",), ("boxes-misread",)),
    "thousandths": Sabotage(each_box(of_1000), "boxes-outside", "must fix", 77, ("thousandths of the image",)),
    "whole images": Sabotage(each_box(whole), "boxes-of-whole-images", "warning", 77, ("annotate the objects",),
        ("boxes-twice", "objects-too-small", "objects-between-anchors")),
    "pictures of the next image": Sabotage(next_pictures, "boxes-misread", "must fix", 23, (
        "put on the image before", "image id")),
    "pictures shuffled": Sabotage(strangers_pictures, "boxes-fit-nothing", "warning", 23, ("file_name and image_id",)),
    "names in capitals": Sabotage(names_in_capitals, "images-missing", "must fix", 3, (
        "'train_000000.png' is there: the json calls it 'TRAIN_000000.PNG'", "the files' own names")),
    "other suffixes": Sabotage(other_suffixes, "images-missing", "must fix", 24, (
        "'train_000000.png' is there: the json calls it 'train/train_000000.jpg'",)),
    "dark 16 bits": Sabotage(dark_16_bits, "images-blank", "warning", 4, ("the upper 8 bits", "image id 1 (train")),
    "a scanned map": Sabotage(scanned_map, "images-too-large", "must fix", 1, ("train_000000.png", "tiles")),
    "areas of 0": Sabotage(areas_of_0, "areas-differ", "warning", 77, ("annotation id 1 of image", "leave area out")),
    "boxes resized alone": Sabotage(boxes_resized_alone, "areas-differ", "warning", 77, ("areas are 4 x the boxes'",)),
    "labelled twice": Sabotage(labelled_twice, "boxes-between-classes", "warning", 20, ("with another class",)),
    "one class": Sabotage(one_class, "class-dominates", "warning", 74, ("'circle', one of 8 classes",), UNKNOWN),
    "a crowd in words": Sabotage(a_crowd_in_words, "entries-malformed", "must fix", 3, (
        "annotations id 1: 'no'", "'iscrowd' must be 0 or 1")),
}  # fmt: skip
