"""The recorded graph of a tensor: as text to read, and as DOT to draw."""

from __future__ import annotations

from collections.abc import Mapping

from minidet.autograd import Node, Tensor, inputs_first


def graph_text(tensor: Tensor, names: Mapping[str, Tensor] | None = None) -> str:
    """How `tensor` was made, a line for each tensor, inputs before what was made of them.

        1  weight    (4, 2)
        2  constant  (3, 4)
        3  matmul    (3, 2)  of 2, 1
        4  relu      (3, 2)  of 3

    Each has one number, however many ops use it.  `names`, such as `dict(model.named_parameters())`, says what
    leaves are called.
    """
    order = inputs_first(tensor, constants=True)
    number = {id(x): str(i) for i, x in enumerate(order, 1)}
    rows = [(number[id(x)], _title(x, names or {}), str(x.shape), _origin(x, number)) for x in order]
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = (f"{n:>{wide[0]}}  {what:{wide[1]}}  {shape:{wide[2]}}  {made}" for n, what, shape, made in rows)
    return "\n".join(line.rstrip() for line in lines)


def graph_dot(tensor: Tensor, names: Mapping[str, Tensor] | None = None) -> str:
    """The same graph in the language of Graphviz: `dot -Tsvg` draws it.  Ops are boxes, leaves ellipses."""
    order = inputs_first(tensor, constants=True)
    number = {id(x): i for i, x in enumerate(order, 1)}
    lines = []
    for x in order:
        lines_of_label = [_title(x, names or {}), _windows(x.node), str(x.shape)]
        label = "\\n".join(line.replace("\\", "\\\\").replace('"', '\\"') for line in lines_of_label if line)
        lines.append(f'  {number[id(x)]} [label="{label}", shape={"ellipse" if x.node is None else "box"}]')
        lines += [f"  {number[id(source)]} -> {number[id(x)]}" for source in (x.node.inputs if x.node else ())]
    return "\n".join(["digraph {", *lines, "}"])


def _title(tensor: Tensor, names: Mapping[str, Tensor]) -> str:
    if tensor.node is not None:
        return tensor.node.op
    found = [name for name, named in names.items() if named is tensor]
    return found[0] if found else "leaf" if tensor.requires_grad else "constant"


def _origin(tensor: Tensor, number: Mapping[int, str]) -> str:
    node = tensor.node
    if node is None:
        return ""
    if node.backward is None:
        return "already run backwards"
    windows = _windows(node)
    return f"of {', '.join(number[id(x)] for x in node.inputs)}" + (f"; {windows}" if windows else "")


def _windows(node: Node | None) -> str:
    """Size of a convolution's or a pooling's windows, and what else is not as usual."""
    if node is None or node.geometry is None:
        return ""
    g, usual = node.geometry, {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    parts = ["x".join(map(str, g.size))]
    for name, value in usual.items():
        down, right = getattr(g, name)
        if (down, right) != value:
            parts.append(f"{name} {down}" if down == right else f"{name} {down}x{right}")
    return ", ".join(parts + ([f"groups {g.groups}"] if g.groups > 1 else []))
