"""The Adadelta of tf.keras for PyTorch: the same numbers, at the speed of the memory bus."""

from typing import Any as _Any

from torch_adadelta import compatibility as _compatibility  # noqa: F401  (first: it refuses what is too old)
from torch_adadelta.conversion import to_bfloat16, to_float32
from torch_adadelta.in_backward import step_in_backward
from torch_adadelta.optimizer import AdadeltaKeras
from torch_adadelta.version import __version__

__all__ = ["AdadeltaKeras", "step_in_backward", "to_bfloat16", "to_float32", "__version__"]


def __getattr__(name: str) -> _Any:
    if name == "keras3":  # it imports Keras
        import importlib

        return importlib.import_module("torch_adadelta.keras3")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
