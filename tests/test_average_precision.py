"""Our AP against pycocotools: published fixtures, random cases, and every rule on its own."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from untraced import untraced

from minidet.data import shapes
from minidet.evaluation import average_precision, evaluate
from minidet.evaluation.average_precision import accumulate, interpolate, iou_with_crowds, match
from minidet.evaluation.coco import with_pycocotools
from minidet.evaluation.inputs import Results, checked
from minidet.evaluation.report import IOU_THRESHOLDS, NUMBERS
from minidet.models import RetinaNet, presets

BOTH = pytest.mark.parametrize("evaluator", [accumulate, with_pycocotools])


@untraced
def straight_from_pycocotools(ground_truth, results):
    """The twelve numbers and all curves, with nothing of minidet in between."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats, evaluator.eval["precision"][:, :, :, 0, 2]


def assert_equals_straight(evaluations, ground_truth, results):
    stats, precision = straight_from_pycocotools(ground_truth, results)
    for evaluation in evaluations:
        np.testing.assert_allclose([evaluation[name] for name in NUMBERS], stats, rtol=0, atol=1e-12)
        np.testing.assert_allclose(evaluation.precision, precision, rtol=0, atol=1e-12)


def assert_equals_pycocotools(ground_truth, results):
    ours, theirs = accumulate(ground_truth, results), with_pycocotools(ground_truth, results)
    assert_equals_straight((ours, theirs), ground_truth, results)
    assert ours.per_class.keys() == theirs.per_class.keys()
    for name, values in ours.per_class.items():
        assert values == pytest.approx(theirs.per_class[name], abs=1e-12), name


def dataset(annotations, images=(1,), categories=(1,)):
    """A COCO dict; an annotation is (image, category, bbox) and, if wanted, more keys."""
    return {
        "images": [{"id": i} for i in images],
        "categories": [{"id": c, "name": f"class {c}"} for c in categories],
        "annotations": [
            {
                "id": n + 1, "image_id": image, "category_id": category, "bbox": list(box),
                "area": box[2] * box[3], "iscrowd": 0, **(more[0] if more else {}),
            }
            for n, (image, category, box, *more) in enumerate(annotations)
        ],
    }  # fmt: skip


def result(box, score=0.9, image=1, category=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def as_results(ground_truth):
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in ground_truth["annotations"]
        if not a["iscrowd"]
    ]


# The fixture: 100 images of COCO, and the numbers printed in pycocotools' own notebook.


def evalfix(data_folder):
    folder = data_folder("evalfix")
    read = [
        json.loads((folder / f"{name}.json").read_text())
        for name in ("gt_instances_val2014_100", "dt_fakebbox100", "expected")
    ]
    image_ids = {r["image_id"] for r in read[1]}
    assert image_ids <= {image["id"] for image in read[0]["images"]}
    return read


@BOTH
def test_the_published_numbers(data_folder, evaluator):
    ground_truth, results, expected = evalfix(data_folder)
    numbers = evaluator(ground_truth, results).numbers
    assert tuple(numbers) == NUMBERS == tuple(expected["order"])
    assert [round(v, 3) for v in numbers.values()] == expected["printed"]
    assert [round(v, 6) for v in numbers.values()] == expected["exact"]


def test_equals_pycocotools_on_the_fixture(data_folder):
    ground_truth, results, _ = evalfix(data_folder)
    assert_equals_straight([accumulate(ground_truth, results)], ground_truth, results)


@BOTH
@pytest.mark.parametrize("name", ["bccd", "coco_free80"])
def test_ground_truth_fed_back_is_perfect(data_folder, evaluator, name):
    path = data_folder(name) / "annotations" / "instances_val.json"
    ground_truth = json.loads(path.read_text())
    evaluation = evaluator(ground_truth, as_results(ground_truth))
    assert evaluation["AP"] == evaluation["AP50"] == evaluation["AP75"] == 1.0
    # Not AR: COCO's images may hold more than 100 objects of a class, and AR1 allows one an image.
    assert evaluation["AR1"] < 1.0


# Random cases.


def random_case(rng, images=12, categories=5, most_objects=6, most_detections=12):
    """Boxes of all sizes, crowds, scores that tie, classes and images with nothing to find."""
    annotations, results = [], []
    for image in range(1, images + 1):
        for category in range(1, categories + 1):
            objects = 0 if category == 2 or image == 3 else rng.integers(0, most_objects + 1)
            boxes = np.empty((0, 4))
            if objects:
                size = np.exp(rng.uniform(np.log(4), np.log(250), (objects, 2)))
                boxes = np.concatenate([rng.uniform(0, 300, (objects, 2)), size], axis=1)
            for box in boxes:
                more = {"iscrowd": int(rng.random() < 0.2), "area": box[2] * box[3] * rng.uniform(0.3, 1)}
                annotations.append((image, category, box.tolist(), more))
            for _ in range(0 if category == 3 else rng.integers(0, most_detections + 1)):
                box = rng.uniform(1, 300, 4)
                if objects and rng.random() < 0.7:
                    box = boxes[rng.integers(objects)] * rng.uniform(0.85, 1.15, 4)
                results.append(result(box.tolist(), float(rng.integers(1, 12) / 12), image, category))
    rng.shuffle(results)
    # Ids out of order and sparse, and one image and one category that nothing mentions.
    image_ids, category_ids = range(images + 1, 0, -1), [90, *range(categories, 0, -1)]
    return dataset(annotations, image_ids, category_ids), results


@pytest.mark.parametrize("seed", range(20))
def test_equals_pycocotools_on_random_cases(seed):
    assert_equals_pycocotools(*random_case(np.random.default_rng(seed)))


def test_equals_pycocotools_beyond_100_detections(rng):
    ground_truth, results = random_case(rng, 3, 4, most_objects=130, most_detections=260)
    assert len(results) > 300
    assert_equals_pycocotools(ground_truth, results)


corner = st.integers(0, 3).map(lambda n: 20 * n)
side = st.sampled_from([0, 10, 20, 32, 40, 96, 100])  # whole numbers: IoUs and areas fall on the limits
box = st.tuples(corner, corner, side, side)
few_ids = st.integers(1, 2)
crowd_or_not = st.sampled_from([{"iscrowd": 0}, {"iscrowd": 1}])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(few_ids, few_ids, box, crowd_or_not), max_size=6),
    st.lists(st.builds(result, box, st.sampled_from([0.2, 0.5, 0.9]), few_ids, few_ids), max_size=8),
)
def test_equals_pycocotools_at_the_ties(annotations, results):
    truth = dataset(annotations, images=(1, 2), categories=(1, 2))
    if results:  # which pycocotools' reader needs
        assert_equals_straight([accumulate(truth, results)], truth, results)
    else:
        np.testing.assert_array_equal(accumulate(truth, results).precision, with_pycocotools(truth, results).precision)


def match_one(iou, crowd, ignored):
    """`match` in a single image, from all its IoUs, (D, G)."""
    rows, columns = np.nonzero(iou >= IOU_THRESHOLDS[0])
    return match(rows, columns, iou[rows, columns], np.zeros(len(iou), int), crowd, ignored)


def match_as_pycocotools(iou, crowd, ignored, threshold):
    """The loops of COCOeval.evaluateImg for one area range and threshold: found and excused, (D,) each."""
    order = np.argsort(ignored, kind="stable")
    taken, found, excused = set(), [], []
    for row in iou:
        best, best_iou = None, min(threshold, 1 - 1e-10)
        for g in order:
            if g in taken and not crowd[g]:
                continue
            if best is not None and not ignored[best] and ignored[g]:
                break
            if row[g] >= best_iou:
                best, best_iou = g, row[g]
        taken.add(best)
        found.append(best is not None)
        excused.append(best is not None and ignored[best])
    return found, excused


@pytest.mark.parametrize("seed", range(20))
def test_match_is_the_plain_loop(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        G = int(rng.integers(1, 6))
        # Few values, so that IoUs tie with each other and with thresholds.
        iou = rng.choice([0, 0.5, 0.7, 0.75, 1], (int(rng.integers(1, 7)), G))
        crowd = rng.random(G) < 0.3
        ignored = crowd | (rng.random((4, G)) < 0.3)
        found, excused = match_one(iou, crowd, ignored)
        for area, t in np.ndindex(4, 10):
            plain = match_as_pycocotools(iou, crowd, ignored[area], IOU_THRESHOLDS[t])
            assert (found[area, t].tolist(), excused[area, t].tolist()) == plain


def test_results_as_columns_are_results():
    truth, results = json.loads(json.dumps(random_case(np.random.default_rng(7))))
    listed = Results.joined(
        (np.array([r["image_id"]]), np.array([r["category_id"]]), np.array([r["bbox"]]), np.array([r["score"]]))
        for r in results
    )
    assert list(listed) == results and listed[3] == results[3] and listed[-1] == results[-1]
    assert list(listed[2:4]) == results[2:4] and len(Results.joined([])) == 0
    columns = (vars(checked(truth, given).detections) for given in (listed, results))
    for one, other in zip(*map(dict.values, columns), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_pairs_are_looked_at_in_parts(monkeypatch):
    truth, results = random_case(np.random.default_rng(11))
    whole = accumulate(truth, results)
    monkeypatch.setattr(average_precision, "MOST_PAIRS", 7)
    np.testing.assert_array_equal(accumulate(truth, results).precision, whole.precision)


# Every rule, by hand.


def test_a_curve_by_hand():
    """Two objects; right, wrong, right: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1."""
    truth = dataset([(1, 1, (0, 0, 50, 50)), (1, 1, (100, 0, 50, 50))])
    boxes = [(0, 0, 50, 50), (300, 300, 50, 50), (100, 0, 50, 50)]
    evaluation = accumulate(truth, [result(b, s) for b, s in zip(boxes, (0.9, 0.8, 0.7), strict=True)])
    recalls, precisions = evaluation.curves(0.5)["class 1"]
    assert np.all(precisions[recalls <= 0.5] == pytest.approx(1))
    assert np.all(precisions[recalls > 0.5] == pytest.approx(2 / 3))
    assert evaluation["AP"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)
    assert (evaluation["AR1"], evaluation["AR10"]) == (0.5, 1.0)


def test_interpolation_takes_the_best_precision_to_come():
    readings = interpolate(np.array([0.0, 0.5, 0.5]), np.array([0.0, 0.5, 0.4]))
    np.testing.assert_array_equal(readings, [0.5] * 51 + [0.0] * 50)


def test_iou_of_a_crowd_is_over_the_detection():
    boxes = np.array([[0.0, 0, 10, 10]] * 4)
    objects = np.array([[0.0, 0, 20, 10], [0, 0, 20, 10], [10, 0, 5, 5], [5, 5, 0, 0]])
    iou = iou_with_crowds(boxes, objects, np.array([False, True, False, True]))
    np.testing.assert_array_equal(iou, [0.5, 1.0, 0.0, 0.0])


def test_a_match_needs_iou_at_the_threshold_or_above():
    found, _ = match_one(np.array([[0.5]]), np.array([False]), np.zeros((4, 1), bool))
    assert found[0, :, 0].tolist() == [True] + [False] * 9
    found, _ = match_one(np.array([[1 - 1e-12]]), np.array([False]), np.zeros((4, 1), bool))
    assert found.all()


def test_an_object_is_found_once_and_a_crowd_often():
    iou = np.full((3, 1), 0.99)
    found, excused = match_one(iou, np.array([False]), np.zeros((4, 1), bool))
    assert found[0, 0].tolist() == [True, False, False] and not excused.any()
    found, excused = match_one(iou, np.array([True]), np.ones((4, 1), bool))
    assert found.all() and excused.all()


def test_an_object_that_counts_is_preferred_to_an_ignored_one():
    ignored = np.array([[True, False]] * 4)
    found, excused = match_one(np.array([[0.99, 0.6]]), np.array([False, False]), ignored)
    assert found[0, :, 0].all()
    # At .50 and .55 and .60 the second object is near enough; above, only the ignored one is.
    assert excused[0, :, 0].tolist() == [False] * 3 + [True] * 7


def test_of_equal_ious_the_later_object_is_taken():
    iou = np.array([[0.7, 0.7], [0.2, 0.7]])
    found, _ = match_one(iou, np.zeros(2, bool), np.zeros((4, 2), bool))
    assert found[0, 0].tolist() == [True, False]


def test_area_ranges_include_both_ends():
    evaluation = accumulate(dataset([(1, 1, (0, 0, 32, 32))]), [result((0, 0, 32, 32))])
    assert [evaluation[name] for name in ("APs", "APm", "APl")] == pytest.approx([1, 1, -1])


def test_only_the_best_hundred_of_an_image_count():
    truth = dataset([(1, 1, (0, 0, 50, 50))])
    wrong = [result((200, 200, 50, 50), 0.9) for _ in range(100)]
    assert accumulate(truth, [*wrong, result((0, 0, 50, 50), 0.8)])["AR100"] == 0.0
    assert accumulate(truth, [*wrong[1:], result((0, 0, 50, 50), 0.8)])["AR100"] == 1.0


def test_annotations_may_leave_out_area_and_crowd_and_number_from_zero():
    truth = dataset([(1, 1, (0, 0, 50, 50), {"id": 0})])
    del truth["annotations"][0]["area"], truth["annotations"][0]["iscrowd"]
    for evaluator in (accumulate, with_pycocotools):
        assert evaluator(truth, [result((0, 0, 50, 50))])["APm"] == pytest.approx(1)


@BOTH
def test_arguments_are_left_alone_and_nothing_is_printed(evaluator, rng, capsys):
    ground_truth, results = random_case(rng, 2, 2)
    before = copy.deepcopy((ground_truth, results))
    evaluator(ground_truth, results)
    assert (ground_truth, results) == before
    assert capsys.readouterr() == ("", "")


@BOTH
def test_scores_and_boxes_may_be_numpy(evaluator):
    truth = dataset([(1, 1, (0, 0, 50, 50))])
    found = {**result((0, 0, 50, 50)), "bbox": np.array([0, 0, 50, 50], np.float32), "score": np.float32(0.5)}
    assert evaluator(truth, [found])["AP"] == pytest.approx(1)


# Nothing there.


@BOTH
def test_no_detections_give_zero_and_a_sentence(evaluator):
    evaluation = evaluator(dataset([(1, 1, (0, 0, 50, 50))], categories=(1, 2)), [])
    assert (evaluation["AP"], evaluation["AR100"], evaluation["APs"]) == (0.0, 0.0, -1.0)
    assert list(evaluation.per_class.values()) == [{"AP": 0.0, "AP50": 0.0}, {"AP": -1.0, "AP50": -1.0}]
    assert "detected nothing above its score threshold." in evaluation.table()


def test_no_detections_names_the_top_score_where_it_is_known():
    evaluation = accumulate(dataset([(1, 1, (0, 0, 50, 50))]), [])
    evaluation = dataclasses.replace(evaluation, top_score=0.0312)
    assert evaluation.remark().endswith("the highest score seen was 0.0312.")


def test_a_model_below_its_threshold_says_how_far():
    data = shapes("val", images=3)
    config = presets.small(data.classes)
    config = dataclasses.replace(config, postprocess=dataclasses.replace(config.postprocess, score_threshold=0.9))
    evaluation = evaluate(RetinaNet(config), data, batch_size=2)
    assert evaluation["AP"] == 0.0 and evaluation.images == 3 and 0.001 < evaluation.top_score < 0.9
    assert f"the highest score seen was {evaluation.top_score:.4f}." in evaluation.table()


@BOTH
def test_no_objects_leave_every_number_undefined(evaluator):
    for results in ([], [result((0, 0, 50, 50))]):
        evaluation = evaluator(dataset([]), results)
        assert set(evaluation.numbers.values()) == {-1.0} and evaluation.curves() == {}
        assert "holds no object" in evaluation.remark()


def test_detections_that_are_all_wrong_get_advice():
    truth = dataset([(1, 1, (100, 100, 50, 50))])
    assert "[x, y, width, height]" in accumulate(truth, [result((100, 100, 150, 150))]).remark()
    assert accumulate(truth, [result((100, 100, 50, 50))]).remark() == ""


# What it refuses.

GOOD = dataset([(1, 1, (0, 0, 50, 50))], images=range(1, 8))


@BOTH
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (result((0, 0, 1, 1), image=99), r"results\[1\]: image_id 99 is not among .* 7 ids \(1, 2, 3, 4, 5, \."),
        (result((0, 0, 1, 1), category=0), r"results\[1\]: category_id 0 is not among .* 1 ids \(1\):"),
        (result((0, float("nan"), 1, 1)), r"results\[1\]: bbox \[0, nan, 1, 1\] must be four finite numbers"),
        (result((0, 0, 1)), r"results\[1\]: bbox \[0, 0, 1\] must be four"),
        (result((0, 0, "1", 1)), r"results\[1\]: bbox \[0, 0, '1', 1\] must be four"),
        ({**result((0, 0, 1, 1)), "bbox": None}, r"results\[1\]: bbox None must be four"),
        (result((5, 5, -1, 1)), r"results\[1\]: bbox \[5, 5, -1, 1\] .* width >= 0"),
        (result((0, 0, 1, 1), float("nan")), r"results\[1\]: score nan must be a finite number"),
        (result((0, 0, 1, 1), None), r"results\[1\]: score None must be a finite number"),
        ({"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}, r"results\[1\]: no 'score'"),
    ],
)
def test_bad_results_are_named(evaluator, entry, message):
    with pytest.raises(ValueError, match=message):
        evaluator(GOOD, [result((0, 0, 50, 50)), entry])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"image_id": 99}, "annotation 1: image_id 99 is not among"),
        ({"category_id": 7}, "annotation 1: category_id 7 is not among"),
        ({"bbox": [0, 0, float("inf"), 1]}, r"annotation 1: bbox \[0, 0, inf, 1\] must be four finite"),
        ({"area": float("nan")}, "annotation 1: area nan must be a number >= 0"),
        ({"area": -4}, "annotation 1: area -4 must be a number >= 0"),
    ],
)
def test_bad_annotations_are_named(more, message):
    with pytest.raises(ValueError, match=message):
        accumulate(dataset([(1, 1, (0, 0, 50, 50), more)]), [])


def test_a_bad_ground_truth_is_named():
    with pytest.raises(ValueError, match="the ground truth has no 'annotations': expected a COCO dict"):
        accumulate({"images": [], "categories": []}, [])
    with pytest.raises(ValueError, match="'images' have id 4 2 times"):
        accumulate(dataset([], images=(4, 4)), [])


def test_classes_of_one_name_stay_apart():
    truth = dataset([], categories=(0, 1, 2))
    for category in truth["categories"][:2]:
        category["name"] = "cells"
    assert checked(truth, []).names == ["cells (id 0)", "cells (id 1)", "class 2"]


# The report.


def test_the_table_is_aligned_text():
    truth = dataset([(1, 1, (0, 0, 50, 50)), (1, 2, (0, 0, 10, 10))], categories=(1, 2, 3))
    evaluation = accumulate(truth, [result((0, 0, 50, 50))])
    assert evaluation.table().splitlines() == [
        "1 images, 2 objects, 1 detections",
        "",
        "                        all   small  medium   large",
        "AP   IoU .50:.95      0.500   0.000   1.000       -",
        "AP50 IoU .50          0.500",
        "AP75 IoU .75          0.500",
        "AR   1 detection      0.500",
        "AR   10 detections    0.500",
        "AR   100 detections   0.500   0.000   1.000       -",
        "",
        "class        AP    AP50",
        "class 1   1.000   1.000",
        "class 2   0.000   0.000",
        "class 3       -       -",
    ]


def test_json_holds_what_metrics_files_hold():
    evaluation = accumulate(GOOD, [result((0, 0, 50, 50))])
    metrics = json.loads(json.dumps(evaluation.to_json()))
    assert list(metrics) == [*NUMBERS, "per_class", "images", "seconds"]
    assert metrics["per_class"]["class 1"] == pytest.approx({"AP": 1, "AP50": 1})
    assert metrics["images"] == 7 and metrics["seconds"] > 0


def test_an_unknown_threshold_lists_the_known():
    with pytest.raises(ValueError, match=r"no curve at IoU 0\.4: COCO evaluates at 0\.50, 0\.55"):
        accumulate(GOOD, []).curves(0.4)
