"""Reference vectors: which folder they come from, and one test for each file in it."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent / "vectors"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--oracle", default=None, metavar="DIR", help="folder of reference vectors (*.npz)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `vectors` runs once for each file that begins with its module's PREFIX."""
    if "vectors" in metafunc.fixturenames:
        paths = [path for path in _files(metafunc.config) if path.name.startswith(metafunc.module.PREFIX)]
        metafunc.parametrize("vectors", paths, ids=[path.stem for path in paths])


@pytest.fixture
def oracle_files(pytestconfig: pytest.Config) -> list[Path]:
    """Every file of the folder."""
    return _files(pytestconfig)


def _files(config: pytest.Config) -> list[Path]:
    # With a default, because the option is unknown where this file is found only during collection.
    folder = Path(config.getoption("--oracle", default=None) or HERE)
    if not folder.is_dir():
        raise pytest.UsageError(f"--oracle {folder}: no such folder")
    return sorted(folder.glob("*.npz"))
