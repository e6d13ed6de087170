"""Kernels: what the Array API standard lacks."""

from minidet.kernels import (
    compiler,  # noqa: F401  first: it says where compiled code is kept
    normalization_gpu,  # noqa: F401  adds versions for a GPU
)
from minidet.kernels.boxes import areas, best_matches, claimed_anchors, pairwise_iou
from minidet.kernels.convolution import (
    add_input_gradient,
    convolve,
    convolve_input_gradient,
    convolve_weight_gradient,
)
from minidet.kernels.focal import focal_loss, focal_terms
from minidet.kernels.kernel import Kernel, only
from minidet.kernels.normalization import norm_to_affine, normalize_groups, normalize_groups_gradient
from minidet.kernels.pointwise import (
    column_sums,
    epilogue_gradient,
    rectify,
    rectify_gradient,
    rectify_sum,
    scale_rows,
)
from minidet.kernels.pooling import max_pool, max_pool_gradient
from minidet.kernels.resample import resample
from minidet.kernels.scatter import scatter_add
from minidet.kernels.selection import best_pairs, probabilities
from minidet.kernels.suppression import batched_nms, nms
from minidet.kernels.windows import gather_windows, scatter_windows

ALL = (
    gather_windows, scatter_windows, convolve, convolve_input_gradient, convolve_weight_gradient, add_input_gradient,
    max_pool, max_pool_gradient, norm_to_affine, normalize_groups, normalize_groups_gradient, rectify, rectify_gradient,
    rectify_sum, scale_rows, column_sums, epilogue_gradient, best_matches, claimed_anchors, best_pairs, nms,
    batched_nms, focal_terms, focal_loss, scatter_add, resample,
)  # fmt: skip
"""Every kernel, for the test that holds its fast versions to its definition."""

__all__ = [
    "ALL", "Kernel", "add_input_gradient", "areas", "batched_nms", "best_matches", "best_pairs", "claimed_anchors",
    "column_sums", "convolve", "convolve_input_gradient", "convolve_weight_gradient", "epilogue_gradient", "focal_loss",
    "focal_terms", "gather_windows", "max_pool", "max_pool_gradient", "nms", "norm_to_affine",
    "normalize_groups", "normalize_groups_gradient", "only", "pairwise_iou", "probabilities", "rectify",
    "rectify_gradient", "rectify_sum", "resample", "scale_rows", "scatter_add", "scatter_windows",
]  # fmt: skip
