"""Records the run of Keras that examples/train_digits.py repeats, to keras_run.json beside this file.

The optimizer is `tf_keras.optimizers.legacy.Adadelta`, which is the class of TensorFlow 2.4. Run it, where
torch_adadelta is installed with its extras "parity" and "examples", with

    python examples/data/record_keras_run.py
"""

import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # must be set before TensorFlow is imported
import numpy as np
import sklearn
import tensorflow as tf
import tf_keras

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import train_digits
from common import Array


def build_model(weights: Sequence[Array], dtype: str) -> Any:
    """The net of `common.convolutional_net` with its weights."""
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [
            layers.Conv2D(32, 3, padding="same", activation="tanh", input_shape=(8, 8, 1), dtype=dtype),
            layers.Conv2D(64, 3, padding="same", activation="tanh", dtype=dtype),
            layers.AveragePooling2D(dtype=dtype),
            layers.Permute((3, 1, 2), dtype=dtype),  # channels first, as PyTorch flattens them
            layers.Flatten(dtype=dtype),
            layers.Dense(128, activation="tanh", dtype=dtype),
            layers.Dense(10, dtype=dtype),
        ]
    )
    # Kernels from (out, in, height, width) to (height, width, in, out), and from (out, in) to (in, out).
    model.set_weights([array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T for array in weights])
    return model


def train(setting: train_digits.Setting, dtype: str) -> tuple[list[float], float]:
    """Trains as the setting says; returns the loss of every batch, and the accuracy on the test images."""
    digits = common.load(dtype)
    images, test_images = (x.reshape(-1, 8, 8, 1) for x in (digits.train_images, digits.test_images))
    model = build_model(setting.weights, dtype)
    optimizer = tf_keras.optimizers.legacy.Adadelta(
        train_digits.LEARNING_RATE, rho=train_digits.RHO, epsilon=train_digits.EPSILON
    )
    loss_function = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(reduce_retracing=True)
    def step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_function(labels, model(images, training=True))
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    losses = [
        float(step(tf.constant(images[indices]), tf.constant(digits.train_labels[indices])))
        for indices in setting.batches
    ]
    return losses, float((model(test_images).numpy().argmax(axis=1) == digits.test_labels).mean())


def main() -> None:
    """Writes the file."""
    digits = common.load()
    setting = train_digits.setting(len(digits.train_labels))
    runs = {dtype: train(setting, dtype) for dtype in ("float32", "float64")}
    file = {
        "what": "losses of every batch; see record_keras_run.py",
        "optimizer": "tf_keras.optimizers.legacy.Adadelta",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {
            "tensorflow": tf.__version__,
            "tf_keras": tf_keras.__version__,
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "sha256": train_digits.fingerprint(digits, setting),
        "accuracy": {dtype: accuracy for dtype, (_, accuracy) in runs.items()},
        "losses": {dtype: losses for dtype, (losses, _) in runs.items()},
    }
    train_digits.RECORDED.write_text(json.dumps(file, indent=0) + "\n")


if __name__ == "__main__":
    main()
