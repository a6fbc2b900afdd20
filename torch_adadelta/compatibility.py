"""Refuses a Python or a PyTorch that is too old, in one sentence, before anything that needs a newer one is imported.

So does pip, unless it is told not to look at dependencies. Older Pythons must be able to read this file.
"""

from __future__ import annotations

import re
import sys
from typing import Final

OLDEST_PYTHON: Final = (3, 10)
OLDEST_TORCH: Final = (2, 10)  # whose stable ABI the compiled libraries are made for


def check_python(version: tuple[int, ...]) -> None:
    """Raises ImportError for a Python older than `OLDEST_PYTHON`."""
    if version < OLDEST_PYTHON:
        raise ImportError(f"torch_adadelta needs Python 3.10 or later, and this is Python {version[0]}.{version[1]}")


def check_torch(version: str) -> None:
    """Raises ImportError for a PyTorch older than `OLDEST_TORCH`. A version that is no number is let pass."""
    release = re.match(r"(\d+)\.(\d+)", version)
    if release is not None and (int(release[1]), int(release[2])) < OLDEST_TORCH:
        raise ImportError(
            f"torch_adadelta needs PyTorch 2.10 or later, and this is PyTorch {version}: "
            "run `pip install --upgrade torch`"
        )


check_python(sys.version_info[:2])

import torch  # noqa: E402  (a PyTorch for another Python may not even be readable)

check_torch(torch.__version__)
