"""How near is near enough, and what two lists of detections being the same means."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from minidet import backend
from minidet.detection import Targets

RTOL = {np.dtype(np.float64): 1e-10, np.dtype(np.float32): 1e-5}
"""Of an op or a loss alone, by the precision it ran in."""


def load(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """What a file says about itself, and its arrays."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("meta"))), arrays


def there(array: np.ndarray):
    """The array, where the test computes: --backend says where that is."""
    return backend.default().asarray(array)


def here(array) -> np.ndarray:
    """What was computed there, as a NumPy array; numbers in a list too."""
    if isinstance(array, list | tuple):
        return np.asarray([here(one) for one in array])
    return array if isinstance(array, bool | int | float | str) else backend.to_numpy(array)


def close(got, want, what: str, *, tolerance: float | None = None) -> None:
    """Equal to `tolerance`, relative to each element, or at a tenth of it to the largest: sums of large
    numbers of both signs come out small."""
    got, want = np.asarray(here(got)), np.asarray(want)
    assert got.shape == want.shape, f"{what}: has shape {got.shape}, expected {want.shape}"
    rtol = RTOL[want.dtype] if tolerance is None else tolerance
    largest = float(np.max(np.abs(want), initial=0, where=np.isfinite(want)))
    np.testing.assert_allclose(got, want, rtol=rtol, atol=0.1 * rtol * largest, err_msg=what)


def equal(got, want, what: str) -> None:
    """Equal, as decisions and positions must be."""
    np.testing.assert_array_equal(here(got), want, err_msg=what)


def same_matches(targets: Targets, boxes: list, labels: list, matched: list) -> None:
    """Every anchor has the class of its object, or is background (-1) or ignored (-2), and the object's box."""
    learned, chosen = here(targets.labels), here(targets.boxes)
    for n, anchors in enumerate(matched):
        classes = np.append(labels[n], [-2, -1])  # so that -1 and -2 stand for themselves
        equal(learned[n], classes[anchors], f"classes of image {n}'s anchors")
    objects = [b[m[m >= 0]].reshape(-1, 4) for b, m in zip(boxes, matched, strict=True)]
    if targets.rows is None:
        chosen = chosen[learned >= 0]
    equal(chosen, np.concatenate(objects), "objects of the anchors")


def unmatched(got, want, *, boxes: float, scores: float) -> list[int]:
    """Positions in `want` of detections that `got`, of (boxes, scores, labels) too, has no partner for.

    Partners have one label, and boxes and scores within the tolerances; nobody has two.  Both lists descend by
    score, so detections can have changed places only where their scores differ by less than `scores`.
    """
    free = np.ones(len(got[1]), bool)
    alone = []
    for i, (box, score, label) in enumerate(zip(*want, strict=True)):
        far = np.abs(got[0] - box).max(axis=1, initial=0)
        partners = free & (got[2] == label) & (far <= boxes) & (np.abs(got[1] - score) <= scores)
        if partners.any():
            free[np.flatnonzero(partners)[0]] = False
        else:
            alone.append(i)
    return alone
