"""Convolution: its geometry, its definition, and the rule that chooses a faster equal."""

from minidet.kernels.convolution.choose import (
    add_input_gradient,
    convolve,
    convolve_input_gradient,
    convolve_weight_gradient,
)
from minidet.kernels.convolution.geometry import Geometry, geometry_of

__all__ = [
    "Geometry", "add_input_gradient", "convolve", "convolve_input_gradient", "convolve_weight_gradient", "geometry_of",
]  # fmt: skip
