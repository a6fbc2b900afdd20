"""What makes tests of small files of our own quick."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Such small tensors are not worth waking another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sandboxed() -> None:
    """For tests in which a process looks first whether HDF5 survives a file."""


@pytest.fixture(autouse=True)
def _unprobed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere none does: it takes a fifth of a second, and these files are ours."""
    if "sandboxed" not in request.fixturenames:
        monkeypatch.setattr("torch_adadelta.keras.hdf5.read_in_sandbox", lambda path, data=None: None)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where recorded files of newer classes are that use all that these add to Adadelta; see keras_added.py."""
    path = tmp_path_factory.mktemp("added")
    with tarfile.open(Path(__file__).resolve().parents[1] / "data" / "keras" / "added.tar.xz") as archive:
        archive.extractall(path, filter="data")
    return path
