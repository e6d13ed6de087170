"""Checks of everything that knows boxes: anchors, matching, coding, suppression, detections, resizing."""

from __future__ import annotations

import numpy as np
from compare import close, equal, here, same_matches, there, unmatched

from minidet import ops
from minidet.autograd import Tensor
from minidet.detection import (
    AnchorConfig,
    CoderConfig,
    Detections,
    LossConfig,
    MatcherConfig,
    PostprocessConfig,
    anchors_for,
    assign,
    build_targets,
    decode_boxes,
    decode_deltas,
    encode_boxes,
    image_weights,
    loss,
    octaves,
    postprocess,
)
from minidet.detection.assignment import assign_from_iou
from minidet.detection.postprocess import clip
from minidet.images import Preprocess, pad_batch
from minidet.kernels import areas, batched_nms, nms, pairwise_iou
from minidet.models.presets import STRIDES, TORCHVISION_SIZES

DETECTRON2 = AnchorConfig(octaves((32, 64, 128, 256, 512)), scale_major=True, strides=STRIDES)


def anchors(case: dict, a: dict[str, np.ndarray]) -> None:
    """The anchors of one cell, of an image, and of unusual levels; large ones sampled."""
    if case["convention"] == "detectron2":
        config = DETECTRON2
    elif case["convention"] == "torchvision":
        sizes = tuple(map(tuple, case.get("sizes", TORCHVISION_SIZES)))
        config = AnchorConfig(sizes, rounded=True) if case["what"] != "custom" else None
    else:
        raise NotImplementedError(f"no check for anchors of {case['convention']!r}")
    if case["what"] == "cell":
        for level in range(len(config.sizes)):  # one cell at the origin
            one = AnchorConfig(config.sizes[level : level + 1], rounded=config.rounded, scale_major=config.scale_major)
            close(anchors_for(one, (8, 8), [(1, 1)]), a[f"level{level}"], f"level {level}", tolerance=1e-7)
        return
    image, grids = tuple(case["image"]), [tuple(grid) for grid in case["grids"]]
    if config is None:  # levels with different numbers of anchors cannot share a head: each by itself
        levels = [
            anchors_for(AnchorConfig((tuple(s),), tuple(r), rounded=True), image, [grid])
            for s, r, grid in zip(case["sizes"], case["aspect_ratios"], grids, strict=True)
        ]
    else:
        counts = np.cumsum([h * w * config.per_cell for h, w in grids])
        levels = np.split(anchors_for(config, image, grids), counts[:-1])
    got = np.concatenate(levels)
    assert len(got) == case.get("count", len(got))
    if case.get("sampled"):
        close(got[a["idx"]], a["anchors_at_idx"], "anchors", tolerance=1e-6)
        close(got.sum(axis=0, dtype=np.float64), a["column_sums"], "sums", tolerance=1e-8)
        sums = [level.sum(axis=0, dtype=np.float64) for level in levels]
        close(sums, a["level_column_sums"], "sums of levels", tolerance=1e-8)
    else:
        close(got, a["anchors"], "anchors", tolerance=1e-6)


def boxcoder(case: dict, a: dict[str, np.ndarray]) -> None:
    """Encoding, decoding and the gradient of decoding; encoded targets are constants and have none."""
    config = CoderConfig(weights=tuple(case["weights"]))
    close(encode_boxes(there(a["gt"]), there(a["anchors"]), config), a["encoded"], "encoded")
    close(decode_boxes(there(a["codes"]), there(a["anchors"]), config), a["decoded"], "decoded")
    codes = Tensor(there(a["codes"]), requires_grad=True)
    decoded = decode_deltas(codes, there(a["anchors"]), config)
    close(decoded.data, a["decoded"], "decoded by the op")
    decoded.backward(there(a["up"]))
    close(codes.grad, a["grad_codes"], "grad_codes")


def clip_boxes(case: dict, a: dict[str, np.ndarray]) -> None:
    rows = np.arange(len(a["boxes"]))
    equal(clip(Detections(a["boxes"], rows, rows), tuple(case["size"])).boxes, a["clipped"], "clipped")


def iou(case: dict, a: dict[str, np.ndarray]) -> None:
    """GIoU loss by both boxes, which it treats alike; IoU and GIoU of all pairs."""
    if case["kind"] == "giou":
        for one, other, gradient in (("boxes1", "boxes2", "grad1"), ("boxes2", "boxes1", "grad2")):
            boxes = Tensor(there(a[one]), requires_grad=True)
            values = ops.giou_loss(boxes, there(a[other]), eps=case["eps"])
            close(values.data, a["loss"], "loss")
            total = ops.sum(values)
            close(total.data, a["sum"], "sum")
            total.backward()
            close(boxes.grad, a[gradient], gradient)
    elif case["kind"] == "pairwise":
        close(areas(there(a["boxes1"])), a["area1"], "areas")
        close(pairwise_iou(there(a["boxes1"]), there(a["boxes2"])), a["iou"], "iou")
        values = ops.giou_loss(Tensor(there(a["boxes1"][:, None])), there(a["boxes2"][None]), eps=0.0).data
        close(1 - values, a["giou"], "giou")
    else:
        raise NotImplementedError(f"no check for {case['kind']!r}")


def matcher(case: dict, a: dict[str, np.ndarray]) -> None:
    """Decisions on a matrix of overlaps, and from boxes where the case has them."""
    config = MatcherConfig(case["high"], case["low"], case["allow_low_quality"], zero_iou=True)
    got = here(assign_from_iou(there(a["quality"]), config))
    equal(got, a["matches"], "matches")
    if "anchors" in a:
        equal(assign(there(a["anchors"]), there(a["gt"]), config), a["matches"], "matches of boxes")
    # detectron2 keeps labels apart: 1 an object, 0 background, -1 ignored.
    equal(np.where(got >= 0, 1, got + 1), a["d2_labels"], "detectron2's labels")
    equal(got[got >= 0], a["d2_matches"][got >= 0], "detectron2's matches")


def suppression(case: dict, a: dict[str, np.ndarray]) -> None:
    """Positions kept, best first; of equal scores the first."""
    if case["kind"] == "nms":
        got = nms(there(a["boxes"]), there(a["scores"]), case["thr"])
    elif case["kind"] == "batched_nms":
        got = batched_nms(there(a["boxes"]), there(a["scores"]), there(a["idxs"]), case["thr"])
    else:
        raise NotImplementedError(f"no check for {case['kind']!r}")
    equal(got, a["stable_keep"], "keep")
    if case["order"] == "fixed":  # else torch's own order among equal scores is not stable
        equal(got, a.get("vanilla", a["keep"]), "what torchvision keeps")


def outputs(case: dict, a: dict[str, np.ndarray]) -> None:
    """What the network's outputs mean: detections, or losses."""
    if case["what"] == "postprocess":
        detections(case, a)
    elif case["what"] == "loss":
        losses(case, a)
    else:
        raise NotImplementedError(f"no check for {case['what']!r}")


def detections(case: dict, a: dict[str, np.ndarray]) -> None:
    config = PostprocessConfig(
        score_threshold=case["score_thresh"],
        top_k=case["topk"],
        nms_threshold=case["nms_thresh"],
        max_detections=case["detections_per_img"],
    )
    levels = sum(name.startswith("anchors_") for name in a)
    join = {n: np.concatenate([a[f"{n}_{i}"] for i in range(levels)], axis=-2) for n in ("cls", "box", "anchors")}
    counts = [len(a[f"anchors_{i}"]) for i in range(levels)]
    for dtype, prefix, tolerance in ((np.float32, "det", 1e-5), (np.float64, "det64_", 1e-10)):
        arrays = [there(join[name].astype(dtype)) for name in ("cls", "box", "anchors")]
        found = postprocess(*arrays, counts, case["image_shapes"], config, CoderConfig())
        for n, got in enumerate(found):
            want = [a[f"{prefix}{n}_{part}"] for part in ("boxes", "scores", "labels")]
            assert len(got) == len(want[1]), f"{prefix}{n}: {len(got)} detections, expected {len(want[1])}"
            alone = unmatched((got.boxes, got.scores, got.labels), want, boxes=100 * tolerance, scores=tolerance)
            assert not alone, f"{prefix}{n}: no partner for detections {alone}"


def losses(case: dict, a: dict[str, np.ndarray]) -> None:
    """Both losses and their gradients, normalised by image and by batch."""
    N = len(a["cls"])
    boxes, labels = ([a[f"{name}{n}"] for n in range(N)] for name in ("gt", "labels"))
    anchors = a["anchors"].astype(np.float64)
    targets = build_targets(there(anchors), boxes, labels, MatcherConfig(low_quality=True, zero_iou=True))
    equal(targets.positives, a["num_foreground"], "positives")
    same_matches(targets, boxes, labels, list(a["matched"]))
    beta = {"beta": case["beta"]} if case["beta"] is not None else {}

    def run(normaliser: str, weights=None):
        config = LossConfig(box=case["loss_type"], normaliser=normaliser, **beta)
        logits, deltas = (Tensor(there(a[name].astype(np.float64)), requires_grad=True) for name in ("cls", "box"))
        weights = image_weights(config, targets.positives)[0] if weights is None else weights
        return loss(logits, deltas, targets, weights, config, CoderConfig()), logits, deltas

    result, logits, deltas = run("image")
    close(result.classification, a["classification"], "classification")
    close(result.box, a["bbox_regression"], "box")
    result.total.backward()
    close(logits.grad, a["grad_cls"], "grad_cls")
    close(deltas.grad, a["grad_box"], "grad_box")
    result, *_ = run("batch")
    close([result.classification, result.box], a["batch_normalised"], "normalised by the batch")
    for n in range(N):
        result, *_ = run("image", np.eye(N)[n])
        close(result.classification, a["sum_cls_per_image"][n], f"classification of image {n}")
        close(result.box, a["sum_box_per_image"][n], f"box of image {n}")


def transform(case: dict, a: dict[str, np.ndarray]) -> None:
    """Sizes, pixels, padding, and boxes there and back."""
    rule = Preprocess(min_size=case["min_size"], max_size=case["max_size"])
    if case["what"] == "sizes":
        resized = np.array([rule.size(*hw) for hw in a["hw"].tolist()])
        equal(resized, a["resized"], "sizes")
        equal(-(-resized // rule.pad_multiple) * rule.pad_multiple, a["padded_alone"], "padded sizes")
        return
    if case["what"] != "pixels":
        raise NotImplementedError(f"no check for {case['what']!r}")
    dtype = np.dtype(case["dtype"])
    images = [a[f"image{i}"] for i in range(len(a["image_sizes"]))]
    batch, sizes = pad_batch([rule.prepare(image, dtype) for image in images], rule.pad_multiple)
    equal(sizes, a["image_sizes"], "sizes")
    # torch's float32 resizing is up to 1.4e-5 away from the same in float64.
    close(np.moveaxis(batch, -1, 1), a["batch"], "pixels", tolerance=1e-4 if dtype == np.float32 else None)
    for i, image in enumerate(images):
        resized = rule.boxes(a[f"boxes{i}"].astype(dtype), image.shape[:2], tuple(sizes[i]))
        close(resized, a[f"boxes_resized{i}"], f"boxes of image {i}")
        back = rule.boxes_back(resized, tuple(sizes[i]), image.shape[:2])
        close(back, a[f"boxes_back{i}"], f"boxes back to image {i}")
