"""torchvision's side on a GPU: its own RetinaNet, eager, channels_last, as its users run it.

It is the network that pretrained weights go into: batch norms and the first two stages are frozen, as in ours.
Without weights `retinanet_resnet50_fpn` would train them all.  cuDNN tries its algorithms, for all sizes stay the same.
"""

from __future__ import annotations

import contextlib
import gc

import numpy as np
import torch
from torchvision.models import resnet50
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from tests.benchmarks.worker import serve

RATE = 1e-8


class NetworkJob:
    """A training step or a detection of one batch, which is on the device, normalised and padded, already."""

    def __init__(self, part: str, images: int, precision: str, tiny: bool) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        self.step, self.amp = part == "train", precision == "bf16"
        torch.backends.cudnn.benchmark = True
        H, W = (64, 96) if tiny else (800, 1344)
        backbone = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
        pyramid = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
        model = RetinaNet(_resnet_fpn_extractor(backbone, 3, **pyramid), 91)
        self.model = model.to(self.device, memory_format=torch.channels_last).train(self.step)
        rng = np.random.default_rng(0)
        pixels = torch.from_numpy(rng.normal(size=(images, 3, H, W)).astype(np.float32)).to(self.device)
        self.images = ImageList(pixels.contiguous(memory_format=torch.channels_last), [(H, W)] * images)
        self.targets = []
        for _ in range(images):
            corner, sides = rng.uniform(0, 0.6, (8, 2)), rng.uniform(0.1, 0.4, (8, 2))
            boxes = (np.concatenate([corner, corner + sides], axis=1) * [W, H, W, H]).astype(np.float32)
            one = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(rng.integers(0, 91, 8))}
            self.targets.append({name: values.to(self.device) for name, values in one.items()})
        self.optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=RATE, momentum=0.9, weight_decay=1e-4
        )

    def _outputs(self):
        features = list(self.model.backbone(self.images.tensors).values())
        return features, self.model.head(features), self.model.anchor_generator(self.images, features)

    def run(self) -> None:
        """Once, to the end."""
        rounding = torch.autocast(self.device, torch.bfloat16) if self.amp else contextlib.nullcontext()
        if self.step:
            with rounding:
                _, outputs, anchors = self._outputs()
                losses = self.model.compute_loss(self.targets, outputs, anchors)
                total = sum(losses.values())
            total.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        else:
            with torch.no_grad(), rounding:
                features, outputs, anchors = self._outputs()
                outputs = {name: values.float() for name, values in outputs.items()}
                per_cell = outputs["cls_logits"].size(1) // sum(f.size(2) * f.size(3) for f in features)
                counts = [f.size(2) * f.size(3) * per_cell for f in features]
                levels = {name: list(values.split(counts, dim=1)) for name, values in outputs.items()}
                cut = [list(a.split(counts)) for a in anchors]
                self.found = self.model.postprocess_detections(levels, cut, self.images.image_sizes)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def reads(self) -> dict:
        """Not counted."""
        return {"reads": None}

    def memory(self) -> dict:
        """What torch's allocator held at most during one call that began with nothing to spare, in MiB."""
        if self.device == "cpu":
            return {"mib": 0.0}
        self.run()  # here cuDNN tries its algorithms, some of which take more memory
        self.release()
        torch.cuda.reset_peak_memory_stats()
        self.run()
        return {"mib": torch.cuda.max_memory_reserved() / 2**20}

    def release(self) -> dict:
        """Let go of memory that nothing needs, for the other side's turn."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return {}


if __name__ == "__main__":
    serve({"network": NetworkJob})
