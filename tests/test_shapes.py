"""The built-in data: pure functions of the index, as hard as promised, and writable as COCO."""

from __future__ import annotations

import json

import numpy as np
import plain_shapes
import pytest

from minidet.data import DataError, chance, coco, drawing, shapes, write_coco
from minidet.data.shapes import MAX_CONTAINED, MAX_IOU, VARIANTS


def placed(**settings) -> list[np.ndarray]:
    """Boxes (G, 4) x, y, width, height of every image: placed, but not drawn."""
    truth = shapes("val", **settings).ground_truth()
    found = {image["id"]: [] for image in truth["images"]}
    for entry in truth["annotations"]:
        found[entry["image_id"]].append(entry["bbox"])
    return [np.array(boxes).reshape(-1, 4) for boxes in found.values()]


def sides(**settings) -> np.ndarray:
    """Width and height of every box."""
    return np.concatenate(placed(**settings))[:, 2:]


def test_an_image_depends_on_its_index_only():
    forwards, backwards = shapes("val", images=5), shapes("val", images=9)
    samples = {index: backwards[index] for index in reversed(range(5))}
    for index in range(5):
        a, b = forwards[index], samples[index]
        assert (a.image_id, a.name) == (b.image_id, b.name) == (index + 1, f"val_{index:06d}.png")
        for field in ("image", "boxes", "labels"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def test_several_at_once_are_those_of_one_by_one():
    dataset = shapes("train", size=45, variant="crowded")
    for index, sample in zip((7, 3, 7, 28_799), dataset.__getitems__((7, 3, 7, 28_799)), strict=True):
        alone = dataset[index]
        assert (sample.image_id, sample.name) == (alone.image_id, alone.name)
        for field in ("image", "boxes", "labels"):
            np.testing.assert_array_equal(getattr(sample, field), getattr(alone, field))


def test_splits_and_seeds_share_no_image():
    images = {
        shapes(split, images=5, seed=seed, size=64)[index].image.tobytes()
        for split in ("train", "val", "test") for seed in (0, 1) for index in range(5)
    }  # fmt: skip
    assert len(images) == 3 * 2 * 5


def test_sizes_without_being_told():
    assert [len(shapes(split)) for split in ("train", "val", "test")] == [28_800, 400, 400]
    assert shapes().size(0) == (128, 128)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_sample_holds(variant):
    for sample in shapes("train", images=4, variant=variant):
        assert sample.image.shape == (128, 128, 3)
        assert sample.image.dtype == np.uint8
        assert sample.boxes.dtype == np.float32
        assert sample.labels.dtype == np.int64
        assert sample.boxes.shape == (len(sample.labels), 4)
        assert np.all(sample.boxes[:, :2] >= 0)
        assert np.all(sample.boxes[:, 2:] <= 128)
        assert np.all(sample.boxes == np.round(sample.boxes))


def test_as_many_and_as_large_as_promised():
    counts = np.array([len(boxes) for boxes in placed(images=300)])
    assert counts.min() == 0
    assert counts.max() == 6
    assert 0.04 < np.mean(counts == 0) < 0.13  # 8 % of them
    assert 2.9 < counts.mean() < 3.5
    side = np.sqrt(sides(images=300).prod(axis=1))
    assert side.min() >= 6
    assert side.max() < 64 * max(drawing.REACH)
    # Log-uniform over 12..64: as many nominal sizes below the geometric mean, 28, as above it.
    assert 22 < np.median(side) < 28


def test_all_classes_are_equally_frequent():
    annotations = shapes("val", images=300).ground_truth()["annotations"]
    frequency = np.bincount([entry["category_id"] - 1 for entry in annotations]) / len(annotations)
    assert len(frequency) == 8
    assert frequency.min() > 0.09
    assert frequency.max() < 0.16


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_object_hides_another(variant):
    for boxes in placed(images=40, variant=variant):
        for n, a in enumerate(boxes):
            for b in boxes[:n]:
                overlap = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
                overlap = np.clip(overlap, 0, None).prod()
                areas = [box[2:].prod() for box in (a, b)]
                assert overlap <= MAX_IOU * (sum(areas) - overlap)
                assert overlap <= MAX_CONTAINED * min(areas)


def test_the_tiny_are_tiny():
    side = np.sqrt(sides(images=60, variant="tiny").prod(axis=1))
    assert side.min() >= 4
    assert side.max() < 16 * max(drawing.REACH) + 1
    assert np.median(side) < 11


def test_the_crowded_are_crowded():
    counts = [len(boxes) for boxes in placed(images=60, variant="crowded")]
    assert min(counts) >= 5
    assert max(counts) > 16
    assert np.mean(counts) > 11


def test_the_elongated_are_elongated():
    lengths = sides(images=60, variant="elongated")
    aspects = lengths.max(axis=1) / lengths.min(axis=1)
    assert aspects.min() >= 3
    assert aspects.max() <= 8
    assert np.mean(aspects > 4.5) > 0.3  # beyond what anchors of ratio 1:2 can reach
    assert 0.3 < np.mean(lengths[:, 0] > lengths[:, 1]) < 0.7


def test_objects_grow_with_the_image():
    small = sides(images=60)
    large = sides(images=60, size=256)
    assert shapes(size=256).size(0) == (256, 256)
    assert shapes(size=256)[0].image.shape == (256, 256, 3)
    assert 1.8 < np.median(large) / np.median(small) < 2.2


@pytest.mark.parametrize("label", range(8), ids=drawing.CLASSES)
def test_an_outline_fills_its_box_and_stays_in_reach(label):
    for turn in np.linspace(0, 2 * np.pi, 9):
        mask = drawing.outline(label, 20.0, 20.0, turn)
        assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any()
        assert max(mask.shape) <= 2 * 20 * drawing.REACH[label] + 1
    # No outline is another one turned: areas, in squared radii, tell most of them apart.
    area = {
        "circle": np.pi, "square": 4 * 0.86**2, "triangle": 1.65**2 / 1.75, "star": 2.02, "ring": 0.7 * np.pi,
        "cross": 4 * 0.6 - 0.36, "ell": 4 * 0.81 - 1.15**2, "half": 0.55 * np.pi,
    }[drawing.CLASSES[label]]  # fmt: skip
    assert drawing.outline(label, 60.0, 60.0, 0.3).sum() / 60**2 == pytest.approx(area, rel=0.02)


def test_stretching_an_outline():
    mask = drawing.outline(drawing.CIRCLE, 40.0, 10.0, 0.7)
    assert mask.shape == pytest.approx((19, 79), abs=1)


def test_a_colour_keeps_its_distance_from_what_lies_under_it(rng):
    state, box, mask = chance.seeded(1), np.array([4, 6, 12, 14]), np.ones(64, bool)
    for _ in range(50):
        under = rng.integers(0, 256, 3)
        planes = np.empty((3, 20, 20), np.float32)
        planes[:] = under[:, None, None]
        drawing.paint(planes, box, mask, state, drawing.normal_quantiles())
        colour = planes[:, 6:14, 4:12].mean(axis=(1, 2))
        assert np.linalg.norm(colour - under) > drawing.COLOUR_GAP - 5  # grain moves the mean a little
        planes[:, 6:14, 4:12] = under[:, None, None]
        assert np.all(planes == under[:, None, None])  # nothing outside the mask was touched


def test_noise_is_normal_and_of_every_strength():
    state, quantiles = chance.seeded(1), drawing.normal_quantiles()
    assert abs(quantiles.mean()) < 1e-6
    assert quantiles.std() == pytest.approx(1, abs=1e-3)

    def noise_of(side):
        image = np.empty((side, side, 3), np.uint8)
        drawing.add_noise(np.full((3, side, side), 128, np.float32), image, state, quantiles)
        return image.astype(float)

    strengths = [noise_of(32).std() for _ in range(60)]
    assert min(strengths) == pytest.approx(3, abs=1.5)
    assert max(strengths) == pytest.approx(20, abs=1.5)
    noise = noise_of(64)
    noise = (noise - noise.mean()) / noise.std()
    assert np.mean(np.abs(noise) < 1) == pytest.approx(0.683, abs=0.02)
    assert abs(np.mean(noise[:, 1:] * noise[:, :-1])) < 0.03  # neighbours know nothing of each other


@pytest.mark.parametrize("numbers", [(0, 0, 0), (7, 1, 2), (2**32 - 1, 5)])
def test_random_numbers_are_those_of_numpy(numbers):
    """Halves of words are kept for whole numbers, and only for them, in whatever order the kinds are drawn."""
    rng, state = np.random.Generator(np.random.SFC64(numbers)), chance.seeded(*numbers)
    for n in range(50):
        assert chance.uniform(state, 3.0, 20.0) == rng.uniform(3, 20)
        assert [chance.integer(state, (-n - 1, n + 2)) for _ in range(n)] == rng.integers(-n - 1, n + 2, n).tolist()
        assert chance.words(state, n).tolist() == rng.bit_generator.random_raw(n).tolist()
    many = 3 * 2**29  # of which a quarter of all halves are refused
    assert [chance.integer(state, (5, 5 + many)) for _ in range(50)] == rng.integers(5, 5 + many, 50).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [32, 45, 128])
def test_images_are_those_of_plain_numpy(variant, size):
    """Compiled for speed, but bit for bit what NumPy draws from the same numbers."""
    dataset = shapes("train", images=4, seed=5, size=size, variant=variant)
    for index, sample in enumerate(dataset):
        image, boxes, labels = plain_shapes.drawn(dataset, index)
        np.testing.assert_array_equal(sample.image, image)
        np.testing.assert_array_equal(sample.boxes, boxes)
        np.testing.assert_array_equal(sample.labels, labels)


def test_ground_truth_is_what_the_samples_hold():
    dataset = shapes("val", images=12)
    truth = dataset.ground_truth()
    assert [category["name"] for category in truth["categories"]] == list(dataset.classes)
    assert [entry["id"] for entry in truth["annotations"]] == list(range(1, len(truth["annotations"]) + 1))
    for index, image in enumerate(truth["images"]):
        sample = dataset[index]
        assert (image["id"], image["file_name"]) == (sample.image_id, sample.name)
        assert (image["height"], image["width"]) == dataset.size(index)
        mine = [entry for entry in truth["annotations"] if entry["image_id"] == image["id"]]
        assert [entry["category_id"] - 1 for entry in mine] == sample.labels.tolist()
        corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in mine)]
        assert corners == sample.boxes.tolist()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "trian"}, "no split 'trian': choose one of train, val, test"),
        ({"variant": "huge"}, "no variant 'huge': choose one of standard, tiny, crowded, elongated"),
        ({"images": 0}, "images must be at least 1"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**32}, "seed must be in"),
        ({"size": 8}, "size must be in 32..4096"),
    ],
)
def test_impossible_shapes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        shapes(**wrong)


def test_an_index_beyond_the_end_is_an_error():
    dataset = shapes("val", images=3)
    for index in (3, -1):
        with pytest.raises(IndexError, match=r"shapes\('val', images=3.*no image"):
            dataset[index]
    assert len(list(dataset)) == 3


def test_written_as_coco_and_read_back_the_same(tmp_path):
    dataset = shapes("val", images=6, seed=2)
    path = write_coco(dataset, tmp_path, "val")
    assert path == tmp_path / "annotations" / "instances_val.json"
    back = coco(tmp_path, "val")
    assert (back.classes, back.category_ids) == (dataset.classes, dataset.category_ids)
    for a, b in zip(dataset, back, strict=True):
        assert (a.image_id, a.name) == (b.image_id, b.name)
        for field in ("image", "boxes", "labels"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    assert back.ground_truth() == dataset.ground_truth()
    assert "seed=2" in json.loads(path.read_text())["info"]["description"]
    with pytest.raises(DataError, match=r"instances_val\.json is there already"):
        write_coco(dataset, tmp_path, "val")
