"""The table of files, as each generation wrote them; see keras_table.py. Needs no Keras."""

from pathlib import Path

import numpy as np
import pytest
from keras_stored import unpacked

pytest.importorskip("h5py", reason="needs the extra 'keras'")

from keras_table import GENERATIONS, ROWS, check, recorded

DATA = Path(__file__).resolve().parents[1] / "data" / "keras"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    for name in ("table.tar.xz", "mixed.tar.xz"):
        unpacked(name, folder)
    return folder


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_table(generation: str, name: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # These files are ours: no process has to look first whether HDF5 survives them.
    monkeypatch.setattr("torch_adadelta.keras.hdf5.read_in_sandbox", lambda path, data=None: None)
    folder = files / generation / name.replace(" ", "_")
    if (generation, name) == ("tf24", "channels first"):
        assert not folder.exists()  # TensorFlow 2.4 has no channels first on a CPU
        return
    found = recorded(folder)
    assert len(found) == {"tf24": 3, "legacy": 4, "new": 5, "keras3": 4}[generation] - (
        name == "subclassed" and "h5" not in found
    )
    check(name, generation, found, np.load(folder / "truth.npz"))
