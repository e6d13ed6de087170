"""Every op with inputs, and beside it the plain NumPy formula that says what comes out."""

from op_cases import activation, arithmetic, losses, norms, shape, windows
from op_cases.case import Case

CASES = [*arithmetic.CASES, *activation.CASES, *shape.CASES, *windows.CASES, *norms.CASES, *losses.CASES]

__all__ = ["CASES", "Case"]
