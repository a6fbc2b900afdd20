"""The table of files, written by a running Keras; see keras_table.py."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="needs the extra 'parity'")
pytest.importorskip("tf_keras", reason="needs the extra 'parity'")
pytest.importorskip("keras", reason="needs the extra 'parity'")

import keras_table_models as models
from keras_table import ROWS, check


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("generation", ["legacy", "new", "keras3"])
def test_the_table(generation: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # These files are ours: no process has to look first whether HDF5 survives them.
    monkeypatch.setattr("torch_adadelta.keras.checkpoints.probe", lambda path, data=None: None)
    models.write(generation, name, tmp_path)
    kinds = [kind for kind in models.KINDS[generation] if (generation, kind, name) not in models.UNWRITTEN]
    check(name, generation, {kind: models.path_of(kind, tmp_path) for kind in kinds}, np.load(tmp_path / "truth.npz"))
