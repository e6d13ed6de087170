"""Ops: functions of Tensors that know their own derivative."""

from minidet.ops.activation import abs, astype, exp, log, log_sigmoid, relu, sigmoid, softmax, sqrt
from minidet.ops.arithmetic import add, div, matmul, maximum, minimum, mul, neg, power, sub, where
from minidet.ops.convolution import conv2d, conv2d_levels
from minidet.ops.normalization import batch_norm, batch_norm_training, group_norm
from minidet.ops.pooling import max_pool2d, upsample_nearest
from minidet.ops.shape import (
    broadcast_to,
    concat,
    getitem,
    max,
    mean,
    min,
    pad,
    permute,
    reshape,
    stack,
    sum,
    take,
)

__all__ = [
    "abs",
    "add",
    "astype",
    "batch_norm",
    "batch_norm_training",
    "broadcast_to",
    "concat",
    "conv2d",
    "conv2d_levels",
    "div",
    "exp",
    "getitem",
    "group_norm",
    "log",
    "log_sigmoid",
    "matmul",
    "max",
    "max_pool2d",
    "maximum",
    "mean",
    "min",
    "minimum",
    "mul",
    "neg",
    "pad",
    "permute",
    "power",
    "relu",
    "reshape",
    "sigmoid",
    "softmax",
    "sqrt",
    "stack",
    "sub",
    "sum",
    "take",
    "upsample_nearest",
    "where",
]
