"""Moving a training job between Keras and PyTorch: the files of four generations of Keras, without Keras."""

from torch_adadelta.keras.errors import KerasFileError
from torch_adadelta.keras.layouts import Layout
from torch_adadelta.keras.moving import Report, freeze_second_biases, load_keras, save_keras

__all__ = ["KerasFileError", "Layout", "Report", "freeze_second_biases", "load_keras", "save_keras"]
