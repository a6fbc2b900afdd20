"""An encoder gives the mean and the variance of a code, and a decoder makes an image of a code that was drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import torch
from keras_jobs import KINDS, Batch, Job, check
from torch import Tensor, nn

CODE = 4


def keras_model(K: Any) -> Any:
    L = K.layers
    image, noise = K.Input((8, 6, 1), name="image"), K.Input((CODE,), name="noise")
    x = L.Conv2D(4, 3, strides=2, padding="same", activation="relu")(image)
    x = L.Conv2D(6, 3, padding="same", activation="relu")(x)
    x = L.Dense(10, activation="relu")(L.Flatten()(x))
    mean, log_variance = L.Dense(CODE, name="mean")(x), L.Dense(CODE, name="log_variance")(x)
    encoder = K.Model(image, [mean, log_variance], name="encoder")

    code = K.Input((CODE,), name="code")
    x = L.Reshape((4, 3, 6))(L.Dense(4 * 3 * 6, activation="relu")(code))
    x = L.Conv2DTranspose(4, 2, strides=2, activation="relu")(x)
    decoder = K.Model(code, L.Conv2D(1, 3, padding="same", activation="sigmoid")(x), name="decoder")

    mean, log_variance = encoder(image)
    drawn = Drawn(K)(name="drawn")([mean, log_variance, noise])
    return K.Model([image, noise], [decoder(drawn), mean, log_variance])


def Drawn(K: Any) -> Any:
    @K.utils.register_keras_serializable("vae")
    class Drawn(K.layers.Layer):  # type: ignore[misc]
        def call(self, inputs: Any) -> Any:
            mean, log_variance, noise = inputs
            return mean + tf.exp(log_variance / 2) * noise

        def compute_output_shape(self, shapes: Any) -> Any:
            return shapes[0]

    return Drawn


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)),  # where Keras pads an even size with strides
            nn.Conv2d(1, 4, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding="same"),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 10),
            nn.ReLU(),
        )
        self.mean = nn.Linear(10, CODE)
        self.log_variance = nn.Linear(10, CODE)
        self.decoder = nn.Sequential(
            nn.Linear(CODE, 72),
            nn.ReLU(),
            nn.Unflatten(1, (6, 4, 3)),
            nn.ConvTranspose2d(6, 4, 2, stride=2),
            nn.ReLU(),
            nn.Conv2d(4, 1, 3, padding="same"),
            nn.Sigmoid(),
        )

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.encoder(image.movedim(-1, 1))
        mean, log_variance = self.mean(features), self.log_variance(features)
        return self.decoder(mean + torch.exp(log_variance / 2) * noise).movedim(1, -1), mean, log_variance


def keras_loss(outputs: Any, targets: Any) -> Any:
    images, mean, log_variance = outputs
    divergence = tf.reduce_sum(tf.square(mean) + tf.exp(log_variance) - log_variance - 1, -1) / 2
    return tf.reduce_mean(tf.reduce_sum(tf.square(images - targets), (1, 2, 3)) + divergence)


def torch_loss(outputs: Any, targets: Tensor) -> Tensor:
    images, mean, log_variance = outputs
    divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(-1) / 2
    return ((images - targets).square().sum((1, 2, 3)) + divergence).mean()


def batch(rng: np.random.Generator) -> Batch:
    image = rng.random((8, 8, 6, 1))
    return [image, rng.standard_normal((8, CODE))], image


JOB = Job(keras_model, VAE, batch, keras_loss, torch_loss, custom_objects=lambda K: {"Drawn": Drawn(K)})


@pytest.mark.slow
@pytest.mark.parametrize("generation", KINDS)
def test_a_convolutional_vae(generation: str, tmp_path: Path) -> None:
    check(JOB, generation, tmp_path)
