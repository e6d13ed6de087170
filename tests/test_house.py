"""The house plan, held: who imports whom, how long files are, and what they may not do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest
from source import PACKAGE, ROOT, imports, nodes, paths, refuse, shown, tree

# A file imports only from strictly lower levels, or from its own folder.
LEVELS = {
    "backend": 0, "launcher": 0,
    "autograd": 1, "plots": 1, "kernels": 1,
    "images": 2, "ops": 2, "graph": 2,
    "nn": 3, "optim": 3, "detection": 3,
    "models": 4,
    "weights": 5, "data": 5,
    "detect": 6,
    "evaluation": 7,
    "training": 8,
    "inspection": 9,
    "cli": 10, "__main__": 11,
    "__init__": 12,
}  # fmt: skip

MOST_LINES = 300
MOST_CODE = 7225  # to read, train, evaluate and detect, without the parts around that
AROUND = (
    "inspection/", "weights/", "cli/", "plots/",
    *(f"data/{name}.py" for name in ("download", "fetch", "unpack", "voc", "index", "json_stream")),
    *(f"training/{name}.py" for name in ("ahead", "average", "communicator", "convert", "recipes", "together")),
)  # fmt: skip
MOST_AROUND = 4500
FASTER = ("compiled", "inner", "njit", "parallel", "faster_on")  # what decorates a function that only makes it fast
MOST_DEFINITIONS = 2350  # code that README's reading order marks with a dot, without what only makes it fast
REMOVABLE = ("kernels/convolution/cpu", "kernels/convolution/gpu")  # speed only: all else runs without them


# Imports.


@cache
def file_of(module: str, name: str = "") -> Path | None:
    """The file of the package that `from module import name` takes `name` from."""
    if module.partition(".")[0] != "minidet":
        return None
    base = ROOT / module.replace(".", "/")
    for path in [base / name / "__init__.py", base / f"{name}.py"] if name else []:
        if path.is_file():
            return path
    if base.with_suffix(".py").is_file():
        return base.with_suffix(".py")
    inside = base / "__init__.py"
    for source, exported, _ in imports(inside) if name else []:
        if exported == name:  # what a folder only passes on belongs to the file that defines it
            return file_of(source, exported)
    return inside


def unit(path: Path) -> str:
    """The folder or the file directly under the package that `path` belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_imports_point_downwards(capsys):
    violations = []
    with capsys.disabled():
        print("\nimport order: a file imports from lower levels, or from its own folder")
        for level in sorted(set(LEVELS.values())):
            print(f"{level:9}  {', '.join(name for name, at in LEVELS.items() if at == level)}")
    for path in paths:
        for module, name, line in imports(path):
            target = file_of(module, name)
            if target is None or unit(target) == unit(path):
                continue
            above, below = LEVELS[unit(path)], LEVELS[unit(target)]
            if below >= above:
                violations.append(
                    f"{shown(path)}:{line}: level {above} imports {shown(target)}, level {below}: only lower levels"
                )
    refuse(violations)


def test_every_import_finds_its_file():
    """`file_of` itself: were it to miss files, the tests here would pass on anything."""
    assert file_of("minidet.kernels", "nms") == PACKAGE / "kernels/suppression.py"
    assert file_of("minidet", "backend") == PACKAGE / "backend.py"
    assert file_of("minidet.kernels.kernel") == PACKAGE / "kernels/kernel.py"
    assert file_of("numpy") is None
    refuse([f"{shown(p)}: belongs to no level" for p in paths if unit(p) not in LEVELS])
    refuse([
        f"{shown(p)}:{line}: {module} is no file" for p in paths for module, name, line in imports(p)
        if (target := file_of(module, name)) and not target.is_file()
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("library", "home"),
    [("matplotlib", "plots"), ("cupy", "backend"), ("array_api_strict", "backend"), ("array_api_compat", "backend")],
)
def test_a_library_has_one_home(library, home):
    at = {unit(p) for p in paths for module, _, _ in imports(p) if module.partition(".")[0] == library}
    assert at <= {home}


def test_importing_everything_needs_no_gpu_no_torch_no_figure():
    program = (
        "import importlib, pkgutil, sys, minidet\n"
        "for found in pkgutil.walk_packages(minidet.__path__, 'minidet.'):\n"
        "    if not found.name.endswith('__main__'): importlib.import_module(found.name)\n"
        "unwanted = ('cupy', 'torch', 'array_api_strict', 'array_api_compat.cupy', 'matplotlib.pyplot')\n"
        "print(*[name for name in unwanted if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_reading_order(capsys):
    """README's list: every file once, and each imports only files above it."""
    text = (ROOT / "README.md").read_text()
    section = re.search(r"^#+ .*reading order.*?\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE | re.IGNORECASE)
    assert section, "README.md has no section called reading order"
    listed = [ROOT / name for name in re.findall(r"`(minidet/[\w/]+\.py)`", section[1])]
    with capsys.disabled():
        print("\nreading order:\n" + "\n".join(f"{n:9}  {shown(path)}" for n, path in enumerate(listed, 1)))
    files = [path for path in paths if path.name != "__init__.py"]  # those only pass names on
    violations = [f"{shown(path)} is missing" for path in files if path not in listed]
    violations += [f"{shown(path)} does not exist" for path in listed if path not in files]
    violations += [f"{shown(path)} is listed twice" for path in set(listed) if listed.count(path) > 1]
    for n, path in enumerate(listed):
        for module, name, line in imports(path) if path in files else []:
            target = file_of(module, name)
            if target in files and target not in listed[: n + 1]:
                violations.append(f"{shown(path)}:{line}: imports {shown(target)}, which comes later")
    refuse(violations)


# Sizes and habits.


@cache
def code_lines(path: Path) -> int:
    """Lines that hold code: not blank, not only a comment, not a docstring."""
    lines = set()
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
                lines |= set(range(token.start[0], token.end[0] + 1)) if token.string else set()
    for node in nodes(path):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_files_are_short_and_the_library_is_small(capsys):
    lines = {path: len(path.read_text().splitlines()) for path in paths}
    code = {path: code_lines(path) for path in paths}
    with capsys.disabled():
        print(f"\n{'lines':>9}{'code':>7}")
        for folder in sorted({path.parent for path in paths}):
            files = [path for path in paths if path.parent == folder]
            print(f"{sum(lines[p] for p in files):9,}{sum(code[p] for p in files):7,}  {shown(folder)}/")
        print(f"{sum(lines.values()):9,}{sum(code.values()):7,}  in all")
    refuse([f"{shown(p)}: {n} lines, not below {MOST_LINES}" for p, n in lines.items() if n >= MOST_LINES])
    needed = {path: n for path, n in code.items() if not shown(path.parent).endswith(REMOVABLE)}
    around = sum(n for path, n in needed.items() if shown(path).removeprefix("minidet/").startswith(AROUND))
    core = sum(needed.values()) - around
    with capsys.disabled():
        print(f"{core:16,}  to read, train, evaluate and detect\n{around:16,}  around that")
    assert core < MOST_CODE
    assert around < MOST_AROUND


def test_the_path_of_definitions_is_short(capsys):
    marked = re.findall(r"^\| • \| `(.*?)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert marked
    count = 0
    for path in (ROOT / name for name in marked):
        compiled = [
            node.end_lineno - node.lineno + 1 + len(node.decorator_list)
            for node in tree(path).body
            if isinstance(node, ast.FunctionDef)
            and any(word in ast.unparse(d) for d in node.decorator_list for word in FASTER)
        ]
        count += code_lines(path) - sum(compiled)
    with capsys.disabled():
        print(f"\n{count:9,} lines of code define everything, in {len(marked)} files")
    assert count < MOST_DEFINITIONS


def test_habits():
    violations = []
    for path in paths:
        if path.stem in ("utils", "misc", "common", "helpers"):
            violations.append(f"{shown(path)}: name a file after what it contains")
        for node in nodes(path):
            if isinstance(node, ast.ExceptHandler) and all(isinstance(s, ast.Pass | ast.Continue) for s in node.body):
                caught = "" if node.type is None else ast.unparse(node.type)
                if caught in ("", "Exception", "BaseException"):
                    violations.append(f"{shown(path)}:{node.lineno}: errors of every kind are swallowed")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                violations.append(f"{shown(path)}:{node.lineno}: {node.func.id}")
        violations += [f"{shown(path)}:{n}: {m}" for m, _, n in imports(path) if m in ("pickle", "shelve", "marshal")]
    refuse(violations)


def test_every_field_of_a_config_is_read():
    """A setting that nothing reads is a promise nobody keeps."""
    read = {node.attr for path in paths for node in nodes(path) if isinstance(node, ast.Attribute)}
    refuse([
        f"{shown(path)}:{field.lineno}: nothing reads {node.name}.{field.target.id}"
        for path in paths for node in nodes(path)
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Recipe"))
        for field in node.body if isinstance(field, ast.AnnAssign) and field.target.id not in read
    ])  # fmt: skip
