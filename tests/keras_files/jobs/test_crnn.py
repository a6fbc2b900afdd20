"""Convolutions make a sequence of an image of text, two GRUs read it both ways, and CTC aligns the letters."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import torch
from keras_jobs import KINDS, Batch, Job, check
from torch import Tensor, nn

LETTERS, LENGTH, STEPS, IMAGES = 5, 3, 8, 6  # the blank is the last letter


def keras_model(K: Any) -> Any:
    L = K.layers
    x = image = K.Input((STEPS * 2, 8, 1), name="image")  # time is the first axis
    x = L.Conv2D(4, 3, padding="same", use_bias=False, name="conv1")(x)
    x = L.BatchNormalization(epsilon=1e-5, momentum=0.9, name="norm1")(x)
    x = L.MaxPooling2D(2)(L.Activation("relu")(x))
    x = L.Conv2D(6, 3, padding="same", activation="relu", name="conv2")(x)
    x = L.Reshape((STEPS, 4 * 6))(x)
    x = L.Dense(12, activation="tanh", name="squeeze")(x)
    x = L.Bidirectional(L.GRU(6, return_sequences=True), name="gru1")(x)
    x = L.Bidirectional(L.GRU(6, return_sequences=True), name="gru2")(x)
    return K.Model(image, L.Dense(LETTERS + 1, name="letters")(x))


class CRNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding="same", bias=False),
            nn.BatchNorm2d(4, eps=1e-5, momentum=0.1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding="same"),
            nn.ReLU(),
        )
        self.squeeze = nn.Linear(24, 12)
        self.gru = nn.GRU(12, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.letters = nn.Linear(12, LETTERS + 1)

    def forward(self, image: Tensor) -> Tensor:
        maps = self.maps(image.movedim(-1, 1))  # (n, channels, time, height)
        steps = maps.movedim(2, 1).flatten(2)
        return self.letters(self.gru(torch.tanh(self.squeeze(steps)))[0])


def keras_loss(outputs: Any, targets: Any) -> Any:
    places = [[n, k] for n in range(IMAGES) for k in range(LENGTH)]
    letters = tf.SparseTensor(places, tf.reshape(targets, [-1]), (IMAGES, LENGTH))
    # That of TensorFlow 2 knows float32 only.
    return tf.reduce_mean(tf.compat.v1.nn.ctc_loss(letters, outputs, [STEPS] * IMAGES, time_major=False))


def torch_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    counts, lengths = torch.full((len(outputs),), STEPS), torch.full((len(outputs),), LENGTH)
    steps = outputs.log_softmax(-1).movedim(1, 0)
    return nn.functional.ctc_loss(steps, targets.long(), counts, lengths, blank=LETTERS, reduction="sum") / len(outputs)


def batch(rng: np.random.Generator) -> Batch:
    letters = np.stack([rng.permutation(LETTERS)[:LENGTH] for _ in range(IMAGES)]).astype("int32")
    return [rng.standard_normal((IMAGES, STEPS * 2, 8, 1))], letters


# Each step of the sequence has the channels of its column in front of the rows: the modules do not show it.
JOB = Job(
    keras_model,
    CRNN,
    batch,
    keras_loss,
    torch_loss,
    {"": {"flatten": "channels_first"}},
)


@pytest.mark.slow
@pytest.mark.parametrize("generation", KINDS)
def test_a_crnn(generation: str, tmp_path: Path) -> None:
    check(JOB, generation, tmp_path)
