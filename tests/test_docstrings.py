"""Docstrings, read: their shapes speak the glossary and agree with the code, and nothing required is missing."""

from __future__ import annotations

import ast
import re

import pytest
from source import PACKAGE, imports, refuse, shown, tree

GLOSSARY = {
    "N": "images", "C": "channels", "H": "input height", "W": "input width", "F": "filters", "P": "output height",
    "Q": "output width", "L": "levels", "A": "anchors per cell", "R": "anchors in all", "K": "classes",
    "G": "ground-truth boxes", "D": "detections", "M": "selected rows", "S": "positions of all levels",
}  # fmt: skip
SECTIONS = ("Shapes", "Units", "Ties", "Rule", "Backward", "Source", "Differs", "Raises")

Definition = ast.FunctionDef | ast.ClassDef


def public(folder: str) -> list[tuple[str, Definition]]:
    """(place, definition) of the public functions and classes at the top of a folder's files."""
    return [
        (f"{shown(path)}:{node.lineno}: {node.name}", node)
        for path in sorted((PACKAGE / folder).rglob("*.py")) for node in tree(path).body
        if isinstance(node, Definition) and not node.name.startswith("_")
    ]  # fmt: skip


def sections(node: Definition) -> dict[str, str]:
    """The docstring's sections by name, in the order in which they stand."""
    parts = re.split(r"^([A-Z][a-z]+):", ast.get_docstring(node) or "", flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base) for base in node.bases]


def calls(node: Definition, name: str) -> bool:
    return any(isinstance(n, ast.Call) and ast.unparse(n.func) == name for n in ast.walk(node))


def decorated(node: Definition, name: str) -> bool:
    return any(ast.unparse(d).startswith(name) for d in node.decorator_list)


SHAPE = r"\(((?:[\w*/+. -]+|\.\.\.)\s*,[\w*/+., \n-]*)\)"  # a comma after the first size: (N, R, 4), (F,)


def unknown_sizes(shapes: str) -> list[str]:
    """Letters in the shapes that are neither in the glossary nor defined on the spot; words explain themselves."""
    known = {*GLOSSARY, *re.findall(r"\b([A-Z]) = ", shapes)}
    letters = [x for shape in re.findall(SHAPE, shapes) for x in re.findall(r"\b([A-Z])(?:_\w+)?\b", shape)]
    return [letter for letter in letters if letter not in known] + re.findall(r"\b(?:num|n)_\w+", shapes)


def contradictions(node: ast.FunctionDef, shapes: str) -> list[str]:
    """Arrays whose shape is unpacked into other letters, or another number of them, than documented."""
    documented = {}
    for names, shape in re.findall(rf"^\s*([\w, ]+): {SHAPE}", shapes, re.MULTILINE):
        documented |= {name: [size.strip() for size in shape.strip(", ").split(",")] for name in names.split(", ")}
    wrong = []
    for n in ast.walk(node):
        if not (isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Tuple)):
            continue
        array = re.fullmatch(r"(\w+)(?:\.data)?\.shape", ast.unparse(n.value))
        stated = documented.get(array[1]) if array else None
        if not stated or "..." in stated or any(isinstance(t, ast.Starred) for t in n.targets[0].elts):
            continue
        unpacked = [ast.unparse(t) for t in n.targets[0].elts]
        pairs = zip(unpacked, stated, strict=False)
        if len(unpacked) != len(stated) or any(len(u) == len(s) == 1 and u != s and u != "_" for u, s in pairs):
            wrong.append(f"{array[1]} is ({', '.join(stated)}) but unpacked as {', '.join(unpacked)}")
    return wrong


def test_shapes_speak_the_glossary_and_agree_with_the_code():
    violations = []
    for folder in ("ops", "kernels", "detection", "models", "evaluation"):
        for where, node in public(folder):
            shapes = sections(node).get("Shapes", "")
            violations += [f"{where}: Shapes: {name} is not in the glossary" for name in unknown_sizes(shapes)]
            if isinstance(node, ast.FunctionDef):
                violations += [f"{where}: Shapes: {wrong}" for wrong in contradictions(node, shapes)]
    refuse(violations)


def test_the_test_of_shapes_sees_mistakes():
    assert unknown_sizes("x: (N, H_l, size, 4)\n  returns: (M,) of rows, or (...)") == []
    assert unknown_sizes("(..., n, k); B = 2 * N; (B, 4)") == []
    assert unknown_sizes("x: (N, T, num_anchors)") == ["T", "num_anchors"]

    def wrong(line):
        return contradictions(ast.parse(f"def f(x):\n    {line}").body[0], "\n    x, y: (N, P, C), with y = ...")

    assert wrong("N, P, C = x.shape") == wrong("N, _, C = y.data.shape") == wrong("N, *rest = x.shape") == []
    assert wrong("N, C, P = x.shape") == ["x is (N, P, C) but unpacked as N, C, P"]
    assert wrong("N, P = x.shape") == ["x is (N, P, C) but unpacked as N, P"]


def exported(folder: str) -> set[str]:
    """What a folder offers to others: the names its __init__.py passes on."""
    return {name for _, name, _ in imports(PACKAGE / folder / "__init__.py")}


@pytest.mark.parametrize(
    ("folder", "needed", "of"),
    [
        ("ops", {"Shapes", "Backward"}, lambda node: calls(node, "record")),
        ("kernels", {"Shapes"}, lambda node: decorated(node, "Kernel")),
        ("detection", {"Source"}, lambda node: isinstance(node, ast.FunctionDef)),
        ("models", {"Source"}, lambda node: isinstance(node, ast.FunctionDef) or "Module" in bases(node)),
    ],
)
def test_docstrings_have_their_sections(folder, needed, of):
    offered = exported(folder)
    candidates = [(where, node) for where, node in public(folder) if node.name in offered and of(node)]
    assert candidates, f"no definition in {folder}/ is looked at: the test would be empty"
    refuse([
        f"{where}: no {name}:" for where, node in candidates for name in sorted(needed - sections(node).keys())
    ])  # fmt: skip


def test_docstrings_begin_with_a_sentence_and_keep_the_order_of_sections():
    violations = []
    for folder in ("ops", "kernels", "detection", "models", "evaluation", "nn", "optim"):
        for where, node in public(folder):
            first = (ast.get_docstring(node) or "").partition("\n\n")[0]
            if decorated(node, "njit") and not first:
                continue  # compiled loops, explained where the kernel is
            if not re.search(r"[.?:)]$", first.partition("\nShapes:")[0].strip()):
                violations.append(f"{where}: the first sentence has no end")
            names = [name for name in sections(node) if name in SECTIONS]
            # Ties and Rule are two names for one place.
            if names != sorted(names, key=lambda name: SECTIONS.index(name.replace("Rule", "Ties"))):
                violations.append(f"{where}: sections stand as {', '.join(names)}")
    refuse(violations)
