"""Moves training jobs between Keras and PyTorch: reads and writes the files of all Keras since 2.0, without Keras."""

from torch_adadelta.keras.errors import KerasFileError
from torch_adadelta.keras.layouts import Layout
from torch_adadelta.keras.report import Report
from torch_adadelta.keras.saving import save_keras
from torch_adadelta.keras.transfer import freeze_second_biases, load_keras

__all__ = ["KerasFileError", "Layout", "Report", "freeze_second_biases", "load_keras", "save_keras"]
