"""What is in the files of Keras, for the tests of `torch_adadelta.keras`; needs h5py."""

import io
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np


def datasets(path: Path) -> dict[str, np.ndarray]:
    """All datasets of an .h5, .keras or .weights.h5 file, by their paths."""
    source: Any = path
    if zipfile.is_zipfile(path):
        source = io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5"))
    found = {}
    with h5py.File(source, "r") as file:
        file.visititems(
            lambda name, item: found.__setitem__(name, item[()]) if isinstance(item, h5py.Dataset) else None
        )
    return found
