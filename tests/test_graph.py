"""The recorded graph, as text and as DOT."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest

from minidet.autograd import Tensor, no_grad
from minidet.graph import graph_dot, graph_text
from minidet.ops import conv2d, exp, matmul, max_pool2d, relu, sum


def leaf(*shape: int) -> Tensor:
    return Tensor(np.zeros(shape), requires_grad=True)


def test_a_small_graph():
    weight = leaf(4, 2)
    y = relu(matmul(Tensor(np.zeros((3, 4))), weight))
    assert graph_text(sum(y + y), {"weight": weight, "unused": leaf(1)}).splitlines() == [
        "1  constant  (3, 4)",
        "2  weight    (4, 2)",
        "3  matmul    (3, 2)  of 1, 2",
        "4  relu      (3, 2)  of 3",
        "5  add       (3, 2)  of 4, 4",
        "6  sum       ()      of 5",
    ]


def test_windows_are_described():
    x, weight, narrow = Tensor(np.zeros((1, 9, 9, 2))), leaf(4, 3, 3, 1), leaf(1, 1, 3, 4)
    y = conv2d(x, weight, stride=2, padding=1, dilation=2, groups=2)
    y = max_pool2d(conv2d(y, narrow, padding=(0, 1)), 2)
    made = [line for line in graph_text(y).splitlines() if " of " in line]
    assert made == [
        "3  conv2d      (1, 4, 4, 4)  of 1, 2; 3x3, stride 2, padding 1, dilation 2, groups 2",
        "5  conv2d      (1, 4, 4, 1)  of 3, 4; 1x3, padding 0x1",
        "6  max_pool2d  (1, 2, 2, 1)  of 5; 2x2, stride 2",
    ]


def test_what_was_not_recorded_is_a_constant():
    with no_grad():
        y = exp(leaf(2))
    assert graph_text(y) == "1  constant  (2,)"
    assert graph_text(leaf(2)) == "1  leaf  (2,)"


def test_a_graph_that_was_run_backwards_says_so():
    loss = sum(exp(leaf(2)))
    loss.backward()
    assert graph_text(loss) == "1  sum  ()  already run backwards"


def test_a_long_graph_needs_no_recursion():
    y = leaf(1)
    for _ in range(5000):
        y = -y
    lines = graph_text(y).splitlines()
    assert len(lines) == 5001
    assert lines[-1] == "5001  neg   (1,)  of 5000"
    assert lines[0] == "   1  leaf  (1,)"


def test_dot():
    weight = leaf(1, 3, 3, 2)
    y = conv2d(Tensor(np.zeros((1, 4, 4, 2))), weight)
    assert graph_dot(y * y, {'a "quoted" name': weight}).splitlines() == [
        "digraph {",
        r'  1 [label="constant\n(1, 4, 4, 2)", shape=ellipse]',
        r'  2 [label="a \"quoted\" name\n(1, 3, 3, 2)", shape=ellipse]',
        r'  3 [label="conv2d\n3x3\n(1, 2, 2, 1)", shape=box]',
        "  1 -> 3",
        "  2 -> 3",
        r'  4 [label="mul\n(1, 2, 2, 1)", shape=box]',
        "  3 -> 4",
        "  3 -> 4",
        "}",
    ]


def test_graphviz_reads_it():
    if shutil.which("dot") is None:
        pytest.skip("Graphviz's `dot` is not installed")
    source = graph_dot(exp(leaf(2)) * 2, {"back\\slash": leaf(1)})
    drawn = subprocess.run(["dot", "-Tsvg"], input=source, capture_output=True, text=True, check=True).stdout
    assert len(re.findall('class="node"', drawn)) == 4
