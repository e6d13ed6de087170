"""Which convolution runs: the seam between the op and every engine.

`ops.conv2d` calls the kernels of this file and nothing else.  Their textbook versions are
definition.py; an engine registers its versions here, each with the rule that says when it runs.
`memo` is the weight tensor's dictionary: an engine may keep there what it derives from the weights.  It
is emptied whenever the weights change, so it can alter the speed and never the result.
"""

from __future__ import annotations

from minidet.kernels.convolution import blocked, definition
from minidet.kernels.convolution.cpu import engine as cpu
from minidet.kernels.convolution.geometry import Geometry
from minidet.kernels.convolution.gpu import engine as gpu
from minidet.kernels.kernel import Kernel

convolve = Kernel(definition.convolve)
convolve_input_gradient = Kernel(definition.convolve_input_gradient)
convolve_weight_gradient = Kernel(definition.convolve_weight_gradient)


@Kernel
def add_input_gradient(before, gy, weight, geometry: Geometry, memo: dict):
    """What x was handed by others that read it, plus `convolve_input_gradient`.

    Shapes:
        before: (N, S, C)
        gy: (N, S', F)
        weight: (F, k, k, C // groups)
        returns: (N, S, C)
    """
    return before + convolve_input_gradient(gy, weight, geometry, memo)


# Its own version for bfloat16, in which the product is bfloat16's.
add_input_gradient.faster_on("cupy", "apart", narrow=True)(add_input_gradient.textbook)

# On NumPy, float32: compiled loops.  Without this line and its import, the folder cpu can be deleted.
cpu.register(convolve, convolve_input_gradient, convolve_weight_gradient, add_input_gradient)

# On CuPy: cuBLAS and our own CUDA.  Without this line and its import, the folder gpu can be deleted.
gpu.register(convolve, convolve_input_gradient, convolve_weight_gradient)

# On NumPy, one group: the same matrix products, a cache-sized block of rows at a time.
convolve.faster_on("numpy", "blocked", when=lambda *a: blocked.accepts(a[6]))(blocked.convolve)
convolve_input_gradient.faster_on("numpy", "blocked", when=lambda *a: blocked.accepts(a[2]))(
    blocked.convolve_input_gradient
)
convolve_weight_gradient.faster_on("numpy", "blocked", when=lambda *a: blocked.accepts(a[2]))(
    blocked.convolve_weight_gradient
)
