"""The names that COCO's classes have, in the order of published detectors: 80 in use, or all 91 ids."""

from __future__ import annotations

COCO_80 = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,"
    "wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,"
    "chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,"
    "toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)
UNUSED_IDS = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""Ids below 91 that no object has: 0 is torchvision's background, of the others COCO thought at first."""

COCO_IDS = tuple(i for i in range(91) if i not in UNUSED_IDS)
_NAMES = dict(zip(COCO_IDS, COCO_80, strict=True))
COCO_91 = tuple(_NAMES.get(i, f"N/A {i}" if i else "__background__") for i in range(91))

CATEGORY_IDS = {COCO_80: COCO_IDS, COCO_91: tuple(range(91))}
"""COCO's own id of every class, for both lists of names."""
BY_NUMBER = {len(names): names for names in CATEGORY_IDS}
"""What the classes of a published detector with so many are called."""
