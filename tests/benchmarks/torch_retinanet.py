"""The same RetinaNet in plain torch: names as in minidet, layers and losses as torchvision writes them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.problem import CLASSES


class ConvNorm(nn.Module):
    """Convolution, norm, rectifier; the r50's frozen batch norm is folded into weight and bias."""

    def __init__(self, channels: int, filters: int, size: int, groups: int, stride: int = 1, relu: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, size, stride, size // 2, bias=not groups)
        self.norm = nn.GroupNorm(groups, filters) if groups else None
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, F, P, Q)."""
        y = self.conv(x)
        y = y if self.norm is None else self.norm(y)
        return functional.relu(y, inplace=True) if self.relu else y


class Block(nn.Module):
    """A residual block: two 3x3, or a bottleneck."""

    def __init__(self, channels: int, width: int, stride: int, groups: int, bottleneck: bool):
        super().__init__()
        filters = 4 * width if bottleneck else width
        if bottleneck:
            self.conv1 = ConvNorm(channels, width, 1, groups)
            self.conv2 = ConvNorm(width, width, 3, groups, stride)
            self.conv3 = ConvNorm(width, filters, 1, groups, relu=False)
        else:
            self.conv1 = ConvNorm(channels, width, 3, groups, stride)
            self.conv2 = ConvNorm(width, width, 3, groups, relu=False)
            self.conv3 = nn.Identity()
        same = channels == filters and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(channels, filters, 1, groups, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, F, P, Q)."""
        return functional.relu(self.shortcut(x) + self.conv3(self.conv2(self.conv1(x))), inplace=True)


class Stage(nn.Module):
    """Blocks, the first with the stride."""

    def __init__(self, channels: int, width: int, count: int, stride: int, groups: int, bottleneck: bool):
        super().__init__()
        filters = 4 * width if bottleneck else width
        blocks = [Block(channels, width, stride, groups, bottleneck)]
        blocks += [Block(filters, width, 1, groups, bottleneck) for _ in range(count - 1)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, F, P, Q)."""
        return self.blocks(x)


class ResNet(nn.Module):
    """Images to C3, C4, C5."""

    def __init__(self, stem: int, widths, counts, groups: int, bottleneck: bool):
        super().__init__()
        self.stem = ConvNorm(3, stem, 7, groups, 2)
        channels, stages = stem, []
        for i, (width, count) in enumerate(zip(widths, counts, strict=True)):
            stages.append(Stage(channels, width, count, 2 if i else 1, groups, bottleneck))
            channels = 4 * width if bottleneck else width
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> three maps."""
        x, levels = functional.max_pool2d(self.stem(images), 3, 2, 1), []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels[1:]


class Pyramid(nn.Module):
    """C3, C4, C5 to P3 .. P7, P6 from C5."""

    def __init__(self, channels, width: int):
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(c, width, 1) for c in channels])
        self.output = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in channels])
        first = nn.Conv2d(channels[-1], width, 3, 2, 1)
        self.extra = nn.ModuleList([first, nn.Conv2d(width, width, 3, 2, 1)])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Three maps -> five."""
        inner = [self.lateral[2](maps[2])]
        for i in (1, 0):
            y = self.lateral[i](maps[i])
            inner.insert(0, y + functional.interpolate(inner[0], size=y.shape[-2:], mode="nearest"))
        levels = [output(x) for output, x in zip(self.output, inner, strict=True)]
        levels.append(self.extra[0](maps[-1]))
        levels.append(self.extra[1](functional.relu(levels[-1])))
        return levels


class Subnet(nn.Module):
    """The tower and the last convolution, on every level."""

    def __init__(self, width: int, depth: int, groups: int, anchors: int, outputs: int):
        super().__init__()
        self.tower = nn.Sequential(*[ConvNorm(width, width, 3, groups) for _ in range(depth)])
        self.final = nn.Conv2d(width, anchors * outputs, 3, padding=1)
        self.outputs = outputs

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Five maps -> (N, R, outputs)."""
        maps = [self.final(self.tower(x)).permute(0, 2, 3, 1) for x in levels]
        return torch.cat([y.reshape(len(y), -1, self.outputs) for y in maps], dim=1)


class Head(nn.Module):
    """Both subnets."""

    def __init__(self, width: int, depth: int, groups: int, classes: int):
        super().__init__()
        self.class_subnet = Subnet(width, depth, groups, 9, classes)
        self.box_subnet = Subnet(width, depth, groups, 9, 4)

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Five maps -> logits (N, R, K) and deltas (N, R, 4)."""
        return self.class_subnet(levels), self.box_subnet(levels)


class RetinaNet(nn.Module):
    """The r50 or the small one."""

    def __init__(self, preset: str):
        super().__init__()
        if preset == "r50":
            self.backbone = ResNet(64, (64, 128, 256, 512), (3, 4, 6, 3), 0, bottleneck=True)
            self.pyramid, self.head = Pyramid((512, 1024, 2048), 256), Head(256, 4, 0, CLASSES[preset])
        else:
            self.backbone = ResNet(16, (16, 32, 64, 128), (2, 2, 2, 2), 8, bottleneck=False)
            self.pyramid, self.head = Pyramid((32, 64, 128), 64), Head(64, 2, 8, CLASSES[preset])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) -> logits, deltas."""
        return self.head(self.pyramid(self.backbone(images)))


def load(model: RetinaNet, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Take over minidet's weights, folding its frozen norms; returns the factor on each folded weight."""
    factors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = name.replace("conv.weight", "norm").replace("conv.bias", "norm")
            if f"{norm}.running_var" in state:
                scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + np.float32(1e-5))
                if name.endswith("bias"):
                    values = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
                    parameter.requires_grad_(False)  # frozen
                else:
                    factors[name] = scale[:, None, None, None]
                    values = state[name] * factors[name]
            else:
                values = state[name]
            parameter.copy_(torch.from_numpy(values.transpose(0, 3, 1, 2) if values.ndim == 4 else values))
    return factors


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """torchvision.ops.box_iou."""
    sides = torch.min(a[:, None, 2:], b[:, 2:]) - torch.max(a[:, None, :2], b[:, :2])
    inside = sides.clamp(min=0).prod(dim=2)
    areas = [(c[:, 2:] - c[:, :2]).prod(dim=1) for c in (a, b)]
    return inside / (areas[0][:, None] + areas[1] - inside)


def match(anchors: Tensor, boxes: Tensor, low_quality: bool) -> Tensor:
    """The object of each anchor, -1 for background, -2 for ignored: torchvision's Matcher."""
    iou = pairwise_iou(boxes, anchors)
    values, best = iou.max(dim=0)
    matches = best.clone()
    matches[values < 0.4] = -1
    matches[(values >= 0.4) & (values < 0.5)] = -2
    if low_quality:
        claimed = torch.where(iou == iou.max(dim=1, keepdim=True)[0])[1]
        matches[claimed] = best[claimed]
    return matches


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """torchvision.ops.sigmoid_focal_loss, summed."""
    p = torch.sigmoid(logits)
    ce = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce * (1 - p_t) ** 2
    return ((0.25 * targets + 0.75 * (1 - targets)) * loss).sum()


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes as deltas from their anchors."""
    sides, anchor_sides = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    shift = boxes[:, :2] + sides / 2 - anchors[:, :2] - anchor_sides / 2
    return torch.cat([shift / anchor_sides, torch.log(sides / anchor_sides)], dim=1)


def losses(logits, deltas, anchors, boxes, labels, low_quality: bool) -> tuple[Tensor, Tensor]:
    """Focal and smooth L1 loss, both divided by the positive anchors of the batch."""
    classification, box, positives = 0, 0, 0
    for n in range(len(logits)):
        matches = match(anchors, boxes[n], low_quality)
        positive, valid = torch.where(matches >= 0)[0], matches != -2
        positives += len(positive)
        targets = torch.zeros_like(logits[n])
        targets[positive, labels[n][matches[positive]]] = 1.0
        classification = classification + focal_loss(logits[n][valid], targets[valid])
        wanted = encode(boxes[n][matches[positive]], anchors[positive])
        box = box + functional.smooth_l1_loss(deltas[n][positive], wanted, beta=1 / 9, reduction="sum")
    return classification / max(1, positives), box / max(1, positives)
