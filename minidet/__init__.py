"""minidet: RetinaNet built from the array up.

    import minidet as md

    train, val = md.coco("BCCD", split="train"), md.coco("BCCD", split="val")
    model = md.RetinaNet(md.presets.small(classes=train.classes), seed=0)
    md.train(model, train, validate=val, images=30_000, out="runs/first")
    print(md.evaluate(model, val).table())
    found = md.detect(model, "photo.jpg")
    found.draw().save("found.png")
"""

from minidet import launcher  # noqa: F401  first: thread pools read their size when they are loaded
from minidet.autograd import Tensor, checkpoint, no_grad
from minidet.data import coco, shapes
from minidet.detect import Found, detect
from minidet.evaluation import Evaluation, evaluate
from minidet.graph import graph_dot, graph_text
from minidet.inspection.doctor import Diagnosis, doctor
from minidet.inspection.explain import explain
from minidet.inspection.explanation import Explanation
from minidet.inspection.layers import layer_table
from minidet.models import RetinaNet, RetinaNetConfig, presets
from minidet.training import RECIPES, TrainConfig, convert, export, load_model, train
from minidet.weights import load_initial

__all__ = [
    "RECIPES",
    "Diagnosis",
    "Evaluation",
    "Explanation",
    "Found",
    "RetinaNet",
    "RetinaNetConfig",
    "Tensor",
    "TrainConfig",
    "checkpoint",
    "coco",
    "convert",
    "detect",
    "doctor",
    "evaluate",
    "explain",
    "export",
    "graph_dot",
    "graph_text",
    "layer_table",
    "load_initial",
    "load_model",
    "no_grad",
    "presets",
    "shapes",
    "train",
]
