"""How good detections are: COCO's protocol, readable, and pycocotools beside it."""

from minidet.evaluation.average_precision import accumulate
from minidet.evaluation.coco import with_pycocotools
from minidet.evaluation.evaluate import detections_of, evaluate
from minidet.evaluation.report import Evaluation

__all__ = ["Evaluation", "accumulate", "detections_of", "evaluate", "with_pycocotools"]
