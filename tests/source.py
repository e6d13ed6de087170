"""The package's own source, for tests that read it."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minidet"

paths = sorted(PACKAGE.rglob("*.py"))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """All of the file's tree."""
    return list(ast.walk(tree(path)))


def called(node: ast.Call) -> str:
    """The last name of what is called: c of `a.b.c()`, "" where that has none."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def refuse(violations: list[str]) -> None:
    """All violations in one readable list, rather than the first."""
    assert not violations, "\n" + "\n".join(violations)


@functools.cache
def imports(path: Path) -> list[tuple[str, str, int]]:
    """(module, name or "", line) of every import, those inside functions included."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [(alias.name, "", node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(path)}:{node.lineno}: a relative import"
            found += [(node.module, alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.Call) and called(node).endswith("import_module"):
            found += [(arg.value, "", node.lineno) for arg in node.args if isinstance(arg, ast.Constant)]
    return found
