"""Reference vectors: which folder they come from, and one test for each file in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from minidet import backend

HERE = Path(__file__).parent / "vectors"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--oracle", default=None, metavar="DIR", help="folder of reference vectors (*.npz)")
    parser.addoption("--backend", choices=("fake", "cupy"), help="compute on a GPU, or a fake one, instead of NumPy")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `vectors` runs once for each file that begins with its module's PREFIX.

    It runs on NumPy, and with -m gpu on a GPU; or where --backend says.
    """
    if "where" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--backend", default=None)
        gpu = pytest.param("cupy", marks=pytest.mark.gpu)
        metafunc.parametrize("where", [chosen] if chosen else ["numpy", gpu], indirect=True)
    if "vectors" in metafunc.fixturenames:
        paths = [path for path in _files(metafunc.config) if path.name.startswith(metafunc.module.PREFIX)]
        metafunc.parametrize("vectors", paths, ids=[path.stem for path in paths])


@pytest.fixture(autouse=True)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which library `compare.there` brings arrays to, and new models use."""
    if request.param == "fake":
        request.getfixturevalue("fake_cupy")
    monkeypatch.setenv("MINIDET_BACKEND", "numpy" if request.param == "numpy" else "cupy")
    try:
        backend.default()
    except RuntimeError as error:
        pytest.skip(str(error))


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
