"""A json file as large as COCO's train2017: the same counts, the same order, outlines of the same length."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

IMAGES, BOXES = 118_287, 860_001
SIZES = ((480, 640), (640, 480), (427, 640), (640, 427), (500, 375), (333, 500))
"""H, W of most of COCO's images."""
NAMES = [f"class {n}" for n in range(80)]
IDS = [n for n in range(1, 91) if n not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
"""COCO's 80 ids: ten of 1..90 were never used."""


def write(path: Path, *, images: int = IMAGES, boxes: int = BOXES, seed: int = 0) -> Path:
    """`boxes` in `images`, shuffled as COCO's are, a hundredth of them crowds; two have no height."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(600_000, images, replace=False)
    size = np.array(SIZES)[rng.integers(len(SIZES), size=images)]
    owner = rng.integers(images, size=boxes)
    limit = size[owner][:, ::-1]
    side = limit * np.exp(rng.uniform(np.log(0.02), np.log(0.9), (boxes, 2)))
    bbox = np.round(np.hstack([rng.random((boxes, 2)) * (limit - side), side]), 2)
    if boxes > 20_000:
        bbox[[7, boxes // 2], 3] = 0
    outlines = [np.round(rng.uniform(0, 480, 2 * int(n)), 2).tolist() for n in rng.geometric(1 / 19, 500) + 2]
    outlines = [json.dumps([outline]) for outline in outlines]
    masks = [json.dumps({"counts": rng.integers(400, size=900).tolist(), "size": [480, 640]}) for _ in range(20)]
    crowd, pick, label = rng.random(boxes) < 0.01, rng.integers(500, size=boxes), rng.integers(80, size=boxes)
    with open(path, "w") as file:
        file.write('{"info": {"year": 2017}, "licenses": [{"id": 1, "name": "none"}], "images": [')
        file.write(", ".join(
            f'{{"license": 1,"file_name": "{i:012}.jpg","coco_url": "http://images.cocodataset.org/train2017/{i:012}.jpg",'
            f'"height": {h},"width": {w},"date_captured": "2013-11-14 11:18:45",'
            f'"flickr_url": "http://farm9.staticflickr.com/8186/{i:012}_8fc7e1ebf4_z.jpg","id": {i}}}'
            for i, (h, w) in zip(ids.tolist(), size.tolist(), strict=True)
        ))  # fmt: skip
        file.write('], "annotations": [')
        rows = zip(
            ids[owner].tolist(), bbox.tolist(), crowd.tolist(), pick.tolist(), label.tolist(), strict=True
        )  # fmt: skip
        for n, (image_id, box, many, outline, k) in enumerate(rows):
            shape = masks[outline % 20] if many else outlines[outline]
            file.write(
                f'{", " if n else ""}{{"segmentation": {shape},"area": {box[2] * box[3] * 0.6},"iscrowd": {int(many)},'
                f'"image_id": {image_id},"bbox": {box},"category_id": {IDS[k]},"id": {n * 3 + 5}}}'
            )
        file.write('], "categories": ')
        file.write(json.dumps([{"id": i, "name": name} for i, name in zip(IDS, NAMES, strict=True)]))
        file.write("}")
    return path
