"""Data sets and the loader that feeds a model from them."""

from minidet.data.augment import Augment
from minidet.data.coco import CocoDataset, coco, write_coco
from minidet.data.download import download_bccd, download_coco
from minidet.data.loader import Batch, Loader
from minidet.data.refusal import DataError
from minidet.data.sample import Dataset, Sample
from minidet.data.shapes import Shapes, shapes

__all__ = [
    "Augment",
    "Batch",
    "CocoDataset",
    "DataError",
    "Dataset",
    "Loader",
    "Sample",
    "Shapes",
    "coco",
    "download_bccd",
    "download_coco",
    "shapes",
    "write_coco",
]
