"""Which of this engine's convolutions runs, and when: the only file choose.py knows.

    shift     3x3 at stride 1 with "same" padding: most of a detector's work, by the fastest matrix products there
              are.  float32 by TF32 or, where that is turned off, exactly; bfloat16; channels in multiples of 4 or 8
    implicit  all the rest of one group, where tensor cores may be used: bfloat16, and float32 by TF32
    im2col    what is left of one group: float64, float32 without TF32, GPUs without either of the two

Groups are left to the definition.  A version that is asked for by name, `kernels.only("implicit")`, runs for all that
it can do, and the definition for the rest.

Results have the dtype of their input, as everywhere, but for the gradient of weights: of bfloat16 it is float32, for
its sums are, and so are the parameters.  Scale and bias may be float32 beside bfloat16.
"""

from __future__ import annotations

from minidet.kernels.convolution.gpu import im2col, implicit, shift
from minidet.kernels.kernel import Kernel


def register(convolve: Kernel, input_gradient: Kernel, weight_gradient: Kernel) -> None:
    """Put this engine's versions into the three kernels, fastest first."""
    for name, version in (("shift", shift), ("implicit", implicit)):
        forward, backward, of_weight = _rules(version.accepts)
        convolve.faster_on("cupy", name, when=forward, narrow=True)(version.convolve)
        input_gradient.faster_on("cupy", name, when=backward, narrow=True)(version.convolve_input_gradient)
        weight_gradient.faster_on("cupy", name, when=of_weight, narrow=True)(version.convolve_weight_gradient)
    for kernel, run, at in (
        (convolve, im2col.convolve, 6),
        (input_gradient, im2col.convolve_input_gradient, 2),
        (weight_gradient, im2col.convolve_weight_gradient, 2),
    ):
        kernel.faster_on("cupy", "im2col", when=lambda *a, at=at: im2col.accepts(a[0], a[at]), narrow=True)(run)


def _rules(accepts):
    """`accepts(array, geometry, channels, filters)` as a question about the arguments of each kernel."""

    def forward(x, weight, bias, scale, shortcut, relu, geometry, memo):
        single = all(a is None or a.dtype.itemsize <= 4 for a in (bias, scale))
        alike = x.dtype == weight.dtype and (shortcut is None or x.dtype == shortcut.dtype)
        return single and alike and accepts(x, geometry, x.shape[2], weight.shape[0])

    def backward(gy, weight, geometry, memo):
        return gy.dtype == weight.dtype and accepts(gy, geometry, weight.shape[3], gy.shape[2])

    def of_weight(x, gy, geometry):
        return x.dtype == gy.dtype and accepts(x, geometry, x.shape[2], gy.shape[2])

    return forward, backward, of_weight
