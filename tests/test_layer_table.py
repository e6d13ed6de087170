"""What the table of layers says of a network: everything is somewhere, and adds up."""

from __future__ import annotations

import numpy as np
import pytest

from minidet.kernels import convolution
from tests.benchmarks.layers import LOSSES, OPTIMIZER, POOL, REST, by_layer, inside

FORWARD = [
    ("convolution", "stem", 0.0, 1.0),
    ("relu_", "", 1.5, 2.0),
    ("max_pool2d", "", 2.0, 4.0),
    ("convolution", "head", 4.0, 8.0),
]
STEP = [
    ("assign_images", "", -3.0, -2.0),
    *FORWARD,
    ("sigmoid", "", 8.0, 9.0),
    ("mul", "", 9.0, 11.0),
    ("convolution_backward", "head", 11.0, 18.0),
    ("max_pool2d_backward", "", 18.0, 20.0),
    ("threshold_backward", "", 20.0, 21.0),
    ("convolution_backward", "stem", 21.5, 25.0),
    ("sgd", "", 25.0, 26.0),
]


def test_forward():
    ms = by_layer(FORWARD, 8250.0)
    assert ms == {"stem": 2000, POOL: 2000, "head": 4000, REST: 250}
    assert inside(FORWARD) == 7500


def test_what_comes_before_the_first_convolution_forward_is_its_own():
    assert by_layer([("norm_to_affine", "", -1.0, -0.5), *FORWARD], 9000.0)["stem"] == 3000


def test_what_follows_the_last_convolution_forward_is_its_own():
    assert by_layer([*FORWARD, ("cat", "", 8.0, 9.0)], 9000.0) == {"stem": 2000, POOL: 2000, "head": 5000, REST: 0}


def test_a_step():
    ms = by_layer(STEP, 30000.0)
    assert ms == {
        "stem": 2000 + 5000, POOL: 2000 + 2000, "head": 4000 + 7000, LOSSES: 3000 + 3000, OPTIMIZER: 1000, REST: 1000
    }  # fmt: skip
    assert sum(ms.values()) == 30000


def test_our_side_notes_every_kernel_and_only_while_it_watches(tmp_path):
    ours = pytest.importorskip("tests.benchmarks.ours")
    job = ours.NetworkJob(
        {"name": "", "preset": "small", "size": 128, "images": 1, "objects": 2, "step": True},
        str(tmp_path / "weights.npz"),
    )
    before = dict(convolution.convolve.fast)
    job.run()
    job.watch()
    job.run()
    events = job.events()["events"]
    assert convolution.convolve.fast == before
    layers = [(name.split()[0], layer) for name, layer, *_ in events if layer]
    assert layers.count(("convolve", "3x3 s1 64->64 @pyramid")) == 4  # two towers of two
    assert layers.count(("convolve_weight_gradient", "3x3 s1 64->64 @pyramid")) == 4
    kernels = {name.split()[0] for name, *_ in events}
    assert {"adamw_step", "normalize_groups", "max_pool", "focal_loss"} <= kernels, kernels
    assert all(np.diff([time for *_, begin, end in events for time in (begin, end)]) >= 0)
    count = len(events)
    job.run()
    assert len(events) == count
