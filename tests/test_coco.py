"""Reading COCO-format data as people have it, and refusing what would spoil a training."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from minidet.data import DataError, coco
from minidet.images import ImageError


def content() -> dict:
    """Two photos of 40 x 30 and an empty one; ids with gaps; one crowd."""
    return {
        "images": [
            {"id": 5, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 9, "file_name": "b.png", "width": 40, "height": 30},
            {"id": 11, "file_name": "empty.png", "width": 20, "height": 10},
        ],
        "annotations": [
            {"id": 70, "image_id": 5, "category_id": 90, "bbox": [2, 3, 10, 20], "area": 150.5, "iscrowd": 0},
            {"id": 71, "image_id": 9, "category_id": 3, "bbox": [30.5, 20, 9.5, 10]},
            {"id": 72, "image_id": 5, "category_id": 3, "bbox": [0, 0, 40, 15], "area": 600, "iscrowd": 1},
            {"id": 73, "image_id": 5, "category_id": 3, "bbox": [20, 10, 8, 8], "area": 64, "iscrowd": 0},
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}],
    }


def write(root, data, *, images="images", split="train", make_images=True):
    """A data set on disk; returns its folder."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    (root / "annotations" / f"instances_{split}.json").write_bytes(text)
    if make_images:
        for n, entry in enumerate(content()["images"]):
            path = root / images / entry["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (entry["width"], entry["height"]), n).save(path)
    return root


def changed(*keys, **values) -> dict:
    """`content()` with one entry changed: `changed("images", 0, width=7)`; a value of ... deletes its key."""
    data = content()
    entry = data
    for key in keys:
        entry = entry[key]
    for key, value in values.items():
        if value is ...:
            del entry[key]
        else:
            entry[key] = value
    return data


def boxes(*four_numbers) -> dict:
    """`content()` with other boxes, as many as are given."""
    data = content()
    data["annotations"] = data["annotations"][: len(four_numbers)]
    for entry, box in zip(data["annotations"], four_numbers, strict=True):
        entry["bbox"] = box
    return data


# --- reading ---------------------------------------------------------------------------------------------


def test_sparse_ids_inside_and_outside(tmp_path):
    dataset = coco(write(tmp_path, content()))
    assert dataset.classes == ("car", "brush")  # in the order of the ids
    assert dataset.category_ids == (3, 90)
    assert len(dataset) == 3
    first = dataset[0]
    assert (first.image_id, first.name) == (5, "a.png")
    assert first.labels.tolist() == [1, 0]
    assert first.boxes.tolist() == [[2, 3, 12, 23], [20, 10, 28, 18]]
    assert (first.boxes.dtype, first.labels.dtype) == (np.float32, np.int64)
    assert first.image.shape == (30, 40, 3)
    assert dataset.size(2) == (10, 20)


def test_crowds_are_evaluated_but_not_learned(tmp_path):
    dataset = coco(write(tmp_path, content()))
    truth = dataset.ground_truth()
    assert [entry["iscrowd"] for entry in truth["annotations"]].count(1) == 1
    assert sum(len(sample.labels) for sample in dataset) == 3
    assert [category["id"] for category in truth["categories"]] == [3, 90]
    assert {e["image_id"]: e["area"] for e in truth["annotations"]}[9] == 95  # not given: width x height
    assert min(entry["id"] for entry in truth["annotations"]) == 1


def test_an_image_without_objects(tmp_path):
    sample = coco(write(tmp_path, content()))[2]
    assert sample.boxes.shape == (0, 4)
    assert sample.labels.shape == (0,)


def test_a_file_without_any_object(tmp_path):
    dataset = coco(write(tmp_path, changed(annotations=[])))
    assert [len(sample.labels) for sample in dataset] == [0, 0, 0]
    assert "3 images (3 without objects), 0 boxes" in dataset.summary()


def test_the_summary_counts(tmp_path):
    data = changed("categories", 0, name="brush")
    data["categories"].append({"id": 4, "name": "cup"})
    data["annotations"][1]["bbox"] = [30.5, 20, 10.7, 10]
    text = coco(write(tmp_path, data)).summary()
    assert "3 images (1 without objects), 3 boxes of 3 classes, 1 crowds left out" in text
    assert "1 boxes clipped" in text
    assert "without a box: cup" in text


def test_a_slight_overhang_is_clipped_in_training_only(tmp_path):
    data = changed("annotations", 1, bbox=[30.5, -1, 10.7, 20])
    dataset = coco(write(tmp_path, data))
    assert dataset[1].boxes.tolist() == [[30.5, 0, 40, 19]]
    assert [30.5, -1, 10.7, 20] in [entry["bbox"] for entry in dataset.ground_truth()["annotations"]]
    with pytest.raises(DataError, match=r"only 0\.5 pixels are clipped"):
        coco(tmp_path, overhang=0.5)


@pytest.mark.parametrize("images", ["images", "train2017", "train", ".", "images/train2017", "images/train"])
def test_images_are_found_where_people_put_them(tmp_path, images):
    root = write(tmp_path, content(), images=images)
    assert coco(root)[1].image.max() == 1
    assert coco(root / "annotations" / "instances_train.json")[1].image.max() == 1


def test_images_elsewhere_and_below(tmp_path):
    data = content()
    for entry in data["images"]:
        entry["file_name"] = f"photos/{entry['file_name']}"
    root = write(tmp_path / "set", data, make_images=False)
    write(tmp_path / "pictures", content(), images="photos")
    assert coco(root, images=tmp_path / "pictures")[1].image.max() == 1


def test_a_json_outside_of_annotations(tmp_path):
    root = write(tmp_path, content(), images=".")
    moved = (root / "annotations" / "instances_train.json").rename(root / "labels.json")
    assert len(coco(moved)) == 3


def test_official_file_names(tmp_path):
    root = write(tmp_path, content(), split="val2017", images="val2017")
    assert len(coco(root, "val")) == len(coco(root, "val2017")) == 3


def rotate(path, size):
    """Store a picture as a camera held sideways does: `size` (W, H) in the file, the other way round upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", size).save(path, exif=exif)


def test_annotations_of_the_upright_picture(tmp_path):
    dataset = coco(write(tmp_path, content()))
    rotate(tmp_path / "images" / "a.png", (30, 40))
    assert dataset[0].image.shape == (30, 40, 3)
    assert "EXIF" not in dataset.summary()


def test_annotations_that_ignore_the_orientation(tmp_path):
    dataset = coco(write(tmp_path, content()))
    rotate(tmp_path / "images" / "a.png", (40, 30))
    assert dataset[0].image.shape == (30, 40, 3)
    assert "1 images used without their EXIF orientation" in dataset.summary()


def test_annotations_of_a_picture_of_another_size(tmp_path):
    dataset = coco(write(tmp_path, content()))
    Image.new("L", (80, 60)).save(tmp_path / "images" / "b.png")
    with pytest.raises(ImageError, match=r"b\.png is 80 x 60, but .*json annotates image id 9 as 40 x 30"):
        dataset[1]


def test_a_line_among_thousands_of_boxes_is_evaluated_but_not_learned(tmp_path):
    """COCO's own train2017 has two boxes of height 0; many such boxes are a mistake, and so is a negative side."""
    many = content()
    box = {"image_id": 9, "category_id": 3, "bbox": [5, 5, 6, 6]}
    many["annotations"] += [{**box, "id": n} for n in range(100, 10_100)]
    many["annotations"][1]["bbox"] = [30.5, 20, 9.5, 0]
    dataset = coco(write(tmp_path, many))
    assert len(dataset[1].boxes) == 10_000
    assert len(dataset.ground_truth()["annotations"]) == 10_004
    assert "1 boxes without area left out of training" in dataset.summary()
    many["annotations"][1]["bbox"] = [30.5, 20, 9.5, -1]
    with pytest.raises(DataError, match=r"annotation id 71 .*has no area"):
        coco(write(tmp_path, many))


# --- refusing --------------------------------------------------------------------------------------------

BAD = {
    "not json": (b'{"images": [', "not valid json: .*line 1 column"),
    "not text": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "not valid json"),
    "empty file": (b"", "not valid json"),
    "nested too deeply": (b"[" * 100_000, "not valid json"),
    "a list of detections": (b"[]", "holds a list, as COCO writes detections"),
    "a number": (b"3", "needs a list called 'images'"),
    "no annotations": (changed(annotations=...), "needs a list called 'annotations'; is this an instances"),
    "images is an object": (changed(images={}), "needs a list called 'images'"),
    "an entry is a string": (changed(images=["a.png"]), r"images\[0\] is 'a\.png', expected an object"),
    "no image": (changed(images=[]), "images is empty"),
    "no category": (changed(categories=[]), "categories is empty"),
    "category without a name": (changed("categories", 1, name=...), "category id 3 needs a name, got None"),
    "category with a blank name": (changed("categories", 1, name=" "), "category id 3 needs a name"),
    "category id twice": (changed("categories", 1, id=90), "category id 90 is 'brush' and 'car'"),
    "category name twice": (changed("categories", 1, name="brush"), "two categories are called 'brush'"),
    "category id is a string": (changed("categories", 1, id="3"), r"categories\[1\]: 'id' must be an integer"),
    "image id twice": (changed("images", 1, id=5), "image id 5 is there twice"),
    "image without id": (changed("images", 1, id=...), r"images\[1\]: 'id' is missing"),
    "image id is a string": (changed("images", 1, id="b"), r"images\[1\]: 'id' must be an integer, got 'b'"),
    "image without size": (changed("images", 1, width=...), "image id 9: 'width' is missing"),
    "image 0 high": (changed("images", 1, height=0), "image id 9: height must be at least 1 pixel"),
    "fractional width": (changed("images", 1, width=40.5), "image id 9: 'width' must be an integer, got 40.5"),
    "no file name": (changed("images", 1, file_name=...), "image id 9: file_name must name a file, got None"),
    "the folder as file name": (changed("images", 1, file_name="./"), "file_name must name a file"),
    "path upwards": (changed("images", 1, file_name="../../etc/passwd"), "'../../etc/passwd' leaves the image"),
    "path down and up": (changed("images", 1, file_name="x/../../b.png"), "leaves the image folder"),
    "absolute path": (changed("images", 1, file_name="/etc/passwd"), "leaves the image folder"),
    "path with a drive": (changed("images", 1, file_name="C:\\b.png"), "leaves the image folder"),
    "path upwards for Windows": (changed("images", 1, file_name="..\\b.png"), "leaves the image folder"),
    "path with a null": (changed("images", 1, file_name="b.png\0.jpg"), "leaves the image folder"),
    "a missing image": (changed("images", 1, file_name="z.png"), r"1 of its 3 images .*z\.png \(image id 9\)"),
    "annotation id twice": (changed("annotations", 1, id=70), "annotation id 70 is there twice"),
    "annotation without id": (changed("annotations", 1, id=...), r"annotations\[1\]: 'id' is missing"),
    "unknown image": (changed("annotations", 1, image_id=8), "annotation id 71: image_id 8 is not the id of any"),
    "unknown category": (
        changed("annotations", 1, category_id=2), r"category_id 2 is not among the categories \(3, 90\).*from 0"
    ),
    "no box": (changed("annotations", 1, bbox=...), "annotation id 71: bbox must be four numbers .*got None"),
    "three numbers": (boxes([1, 2, 3]), r"bbox must be four numbers .*got \[1, 2, 3\]"),
    "a box of strings": (boxes(["1", "2", "3", "4"]), "bbox must be four numbers"),
    "a box of booleans": (boxes([True, True, True, True]), "bbox must be four numbers"),
    "NaN": (boxes([1, 2, float("nan"), 4]), "bbox must be four numbers .*nan"),
    "infinity": (boxes([1, 2, float("inf"), 4]), "bbox must be four numbers .*inf"),
    "too large for any float": (boxes([1, 2, 10**400, 4]), "bbox must be four numbers"),
    "no width": (
        boxes([1, 2, 5, 6], [1, 2, 0, 6]),
        r"annotation id 71 \(image id 9, b\.png, 40 x 30\): bbox \[1, 2, 0, 6\] has no area",
    ),
    "negative height": (boxes([1, 20, 5, -6]), "has no area"),
    "outside": (boxes([50, 5, 6, 6], [2, 2, 4, 4]), "reaches over x 50..56 and y 5..11, beyond its image"),
    "just outside": (boxes([40, 5, 1, 6], [0, 0, 6, 6]), "beyond its image; only 2 pixels are clipped"),
    "corners": (boxes([2, 3, 35, 25], [20, 10, 39, 29]), "all 2 boxes .* would fit as x1, y1, x2, y2"),
    "centres": (boxes([35, 15, 10, 20], [8, 4, 6, 8]), "all 2 boxes of the file would fit as centre x"),
    "rows before columns": (boxes([15, 30, 10, 8]), "would fit with x and y, or the images' width and height, ex"),
    "fractions": (boxes([0.1, 0.2, 0.5, 0.5], [0.0, 0.0, 1.0, 0.9]), "lies in 0..1, like every other: multiply"),
    "negative area": (changed("annotations", 1, area=-3), "annotation id 71: area must be a number of pixels"),
    "area NaN": (changed("annotations", 1, area=float("nan")), "area must be a number of pixels, got nan"),
    "iscrowd": (changed("annotations", 1, iscrowd="no"), "annotation id 71: iscrowd must be 0 or 1, got 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_when_it_is_read(tmp_path, name):
    data, message = BAD[name]
    root = write(tmp_path, data)
    with pytest.raises(DataError, match=rf"(?s)instances_train\.json: .*{message}"):
        coco(root)


def test_what_is_missing_on_disk_is_said(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        coco(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no annotations/instances_train\.json; is it a data set in COCO's"):
        coco(tmp_path)
    root = write(tmp_path, content(), make_images=False)
    with pytest.raises(DataError, match=r"no annotations/instances_val\.json; it has the splits train"):
        coco(root, "val")
    with pytest.raises(DataError, match=r"3 of its 3 images are missing; looked for a\.png .*train2017"):
        coco(root)


def test_an_image_that_disappears_later_is_named(tmp_path):
    dataset = coco(write(tmp_path, content()))
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(ImageError, match=r"b\.png: no such file"):
        dataset[1]


# --- real data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "images", "count"), [("train", 205, 2804), ("val", 87, 1137)])
def test_bccd(data_folder, split, images, count):
    dataset = coco(data_folder("bccd"), split)
    assert dataset.classes == ("RBC", "WBC", "Platelets")
    assert len(dataset) == images
    assert len(dataset.ground_truth()["annotations"]) == count
    sample = dataset[0]
    assert sample.image.shape == (*dataset.size(0), 3)
    assert len(sample.boxes) == len(sample.labels) > 0


def test_coco_with_crowds_greys_and_empties(data_folder):
    dataset = coco(data_folder("coco_free80"), "train")
    assert len(dataset.classes) == 80
    assert (dataset.category_ids[0], dataset.category_ids[-1]) == (1, 90)
    assert "92 images (1 without objects), 820 boxes of 80 classes, 9 crowds" in dataset.summary()
    truth, original = dataset.ground_truth()["annotations"], json.loads(dataset.path.read_text())["annotations"]
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    read, given = (sorted([a[key] for key in keys] for a in found) for found in (truth, original))
    assert read == given
    for sample in dataset:
        assert sample.image.ndim == 3
        assert np.all(sample.boxes[:, 2:] > sample.boxes[:, :2])
