"""The learning rate, as a function of how many images have been seen."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

REFERENCE_BATCH = 16  # the paper's: 8 GPUs with 2 images each (section 4.1 "Optimization")


@dataclass(frozen=True)
class Schedule:
    """A peak rate times four factors, each 1 unless asked for; all lengths are in *images*.

        lr(position) = peak * warm-up * steps * cosine * cool-down

    Counting images instead of steps makes a schedule independent of the batch size: halving the batch
    never silently halves the training.  `position` is the number of images seen before the step, so
    the first step has position 0 and the last one `images - batch`.

    Rule: a milestone acts from position == milestone on; equal milestones act twice.
    Source: RetinaNet, arXiv:1708.02002, section 4.1 "Optimization" (divide by 10 at 60k and 80k of 90k
        steps); warm-up: Goyal et al., arXiv:1706.02677, section 2.2; cosine: Loshchilov & Hutter,
        arXiv:1608.03983, eq. (5) without restarts; cool-down: Hägele et al., arXiv:2405.18392, section 3.
    """

    peak: float
    images: int  # length of the whole training
    warmup: int = 0  # images until the peak; linear
    warmup_start: float = 1 / 1000  # fraction of the peak at position 0
    milestones: tuple[int, ...] = ()  # images
    factor: float = 0.1  # multiplies the rate at each milestone
    cosine: bool = False  # half a cosine from 1 to 0 over all images
    cooldown: float = 0.0  # last fraction of the images, over which the rate falls linearly to 0

    def __post_init__(self):
        if not self.peak > 0:
            raise ValueError(f"schedule: peak must be above 0, got {self.peak}")
        if self.images < 1:
            raise ValueError(f"schedule: images must be at least 1, got {self.images}")
        if self.warmup < 0:
            raise ValueError(f"schedule: warmup must not be negative, got {self.warmup}")
        if not 0 <= self.warmup_start <= 1:
            raise ValueError(f"schedule: warmup_start must be in [0, 1], got {self.warmup_start}")
        if list(self.milestones) != sorted(self.milestones) or min(self.milestones, default=0) < 0:
            raise ValueError(f"schedule: milestones must ascend, none below 0, got {self.milestones}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"schedule: cooldown is a fraction in [0, 1], got {self.cooldown}")

    def lr(self, position: int) -> float:
        """The learning rate of the step that begins after `position` images."""
        rate = self.peak
        if position < self.warmup:
            rate *= self.warmup_start + (1 - self.warmup_start) * position / self.warmup
        rate *= self.factor ** bisect_right(self.milestones, position)
        if self.cosine:
            rate *= (1 + math.cos(math.pi * position / self.images)) / 2
        if self.cooldown:
            left = max(self.images - position, 0) / self.images
            rate *= min(left / self.cooldown, 1)
        return rate


def linear_rule(lr: float, batch: int) -> float:
    """The peak rate for `batch` images a step, given the rate for the paper's 16.

    Source: Goyal et al., arXiv:1706.02677, section 2.1.
    """
    return lr * batch / REFERENCE_BATCH
