"""A batch of eight is two times four: the gradient, and the weights after a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from minidet import backend
from minidet.data import Batch, Loader, Sample, shapes
from minidet.data.upload import Parts
from minidet.detection import AnchorConfig, octaves
from minidet.models import HeadConfig, PyramidConfig, ResNetConfig, RetinaNet, presets
from minidet.nn import Norm
from minidet.optim import SGD
from minidet.training import SHAPES
from minidet.training.step import batch_gradient

LR = 0.1


class Sizes:
    """The built-in images, cut to eight sizes: what is padded depends on who else is in the batch."""

    def __init__(self):
        self.inner = shapes("train", images=8, size=96)
        self.classes, self.category_ids = self.inner.classes, self.inner.category_ids

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Sample:
        sample = self.inner[index]
        size = 96 - 8 * index  # of the four that come first, none is as large as the largest of the others
        inside = np.all(sample.boxes[:, 2:] <= size, axis=1)
        image = sample.image[:size, :size]
        return replace(sample, image=image, boxes=sample.boxes[inside], labels=sample.labels[inside])


def model_with(norm: Norm, xp) -> RetinaNet:
    config = presets.small(shapes().classes)
    return RetinaNet(
        replace(
            config,
            backbone=ResNetConfig(stem=8, widths=(8, 16), blocks=(1, 1), bottleneck=False, norm=norm),
            pyramid=PyramidConfig(channels=16, levels=2),
            head=HeadConfig(depth=1, norm=Norm("group", groups=4), he_towers=True),
            anchors=AnchorConfig(octaves((16, 32)), strides=(8, 16)),
        ),
        xp=xp,
    )


def one_step(norm: Norm, parts: int, dtype=np.float32, xp=np, coming: int = 1) -> tuple[dict, dict, Batch]:
    """The gradients of one batch of eight, the parameters after a step of SGD along them, and the batch."""
    model = model_with(norm, xp)
    config = replace(SHAPES, rule=SGD(momentum=0.9), weight_decay=1e-4)
    batches = iter(Loader(Sizes(), model.config.preprocess, batch_size=8, shuffle=False, parts=coming, xp=xp))
    batch = next(batches)
    if dtype != np.float32:
        batch = replace(batch, images=batch.images.astype(dtype))
    batch_gradient(model, batch, parts, moving=100.0)
    gradients = {n: backend.to_numpy(p.grad).copy() for n, p in model.named_parameters() if p.requires_grad}
    config.optimizer(model).step(LR)
    return gradients, {name: backend.to_numpy(p.data) for name, p in model.named_parameters()}, batch


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("norm", [Norm("frozen"), Norm("group", groups=4)], ids=["frozen", "group"])
def test_eight_are_two_times_four(norm, dtype):
    """To a millionth of the largest gradient, each image padded to the size of the whole batch."""
    whole, after_whole, batch = one_step(norm, 1, dtype)
    parts, after_parts, _ = one_step(norm, 2, dtype)
    assert len({tuple(size) for size in batch.sizes}) == 8 and sum(map(len, batch.boxes[4:])) > 0
    largest = max(float(np.abs(g).max()) for g in whole.values())
    worst = max(float(np.abs(parts[name] - g).max()) for name, g in whole.items())
    assert 0 < worst <= 1e-6 * largest
    for name, after in after_whole.items():
        spacing = np.spacing(np.abs(after).max())  # of the float32 that parameters are kept in
        np.testing.assert_allclose(after_parts[name], after, rtol=0, atol=LR * 1e-6 * largest + spacing, err_msg=name)


def test_parts_that_come_to_a_gpu_one_by_one_give_the_same_bits(fake_cupy):
    """As those of a batch that is there as a whole."""
    xp = backend.load("cupy")
    whole, after_whole, _ = one_step(Norm("frozen"), 2, xp=xp)
    parts, after_parts, batch = one_step(Norm("frozen"), 2, xp=xp, coming=2)
    assert isinstance(batch.images, Parts) and whole.keys() == parts.keys()
    for want, got in ((whole, parts), (after_whole, after_parts)):
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
