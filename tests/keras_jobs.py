"""A training job that begins in Keras, goes on in PyTorch, and ends in Keras; both compute all of it to compare.

Everything is float64. A job gives its model, its loss and its batches in both libraries; `check` does the rest.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tensorflow", reason="needs the extra 'parity'")
pytest.importorskip("tf_keras", reason="needs the extra 'parity'")
pytest.importorskip("keras", reason="needs the extra 'parity'")

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import tensorflow as tf
from keras_table_models import optimizer_of, precision

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import Report, load_keras, save_keras

# What each generation is saved in, and loads with all that it needs to go on.
KINDS: Final = {"legacy": "h5", "new": "keras", "keras3": "weights.h5"}

# Numbers that float32 holds, for the older class rounds them to it where the newer ones do not.
OPTIONS: Final = {"learning_rate": 0.5, "rho": 0.875, "epsilon": 2.0**-20}

TOLERANCE: Final = 1e-7

BEFORE, HERE, AFTER = 20, 60, 20

Batch = tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]  # inputs, and targets


class Job(NamedTuple):
    """A model in both libraries.

    Args:
        keras: builds the model from a library: `keras` or `tf_keras`.
        torch: builds it here, in float32.
        batch: inputs and targets, drawn by a generator of random numbers.
        keras_loss: of the outputs and the targets, in TensorFlow.
        torch_loss: the same here.
        options: of `load_keras` and `save_keras`, by the kind of file; "" for all.
        custom_objects: classes in the model of Keras, from a library.
        mode: what sets the modules to training.
    """

    keras: Callable[[Any], Any]
    torch: Callable[[], nn.Module]
    batch: Callable[[np.random.Generator], Batch]
    keras_loss: Callable[[Any, Any], Any] = lambda outputs, targets: tf.reduce_mean(tf.square(outputs - targets))
    torch_loss: Callable[[Any, Tensor], Tensor] = nn.functional.mse_loss
    options: Mapping[str, dict[str, Any]] = {}
    custom_objects: Callable[[Any], dict[str, Any]] = lambda K: {}
    mode: Callable[[nn.Module], Any] = nn.Module.train


def check(job: Job, generation: str, tmp_path: Path) -> Report:
    """Moves a job to PyTorch after `BEFORE` steps and back after `HERE` more; the losses of both are the same."""
    rng = np.random.default_rng(0)
    batches = [job.batch(rng) for _ in range(BEFORE + HERE + AFTER)]
    before, here, after = batches[:BEFORE], batches[BEFORE : BEFORE + HERE], batches[BEFORE + HERE :]
    kind = KINDS[generation]
    path, back = tmp_path / f"job.{kind}", tmp_path / f"back.{kind}"
    options = {**job.options.get("", {}), **job.options.get(kind, {})}
    with precision(generation, "") as K:
        theirs = compiled(job, K, generation)
        train_keras(job, theirs, before)
        save(theirs, path)
        if kind == "weights.h5":
            options["config"] = theirs.to_json()
        ours, optimizer, report = load(job, path, **options)
        assert optimizer.iterations == BEFORE
        np.testing.assert_allclose(
            train(job, ours, optimizer, here), train_keras(job, theirs, here), rtol=TOLERANCE, err_msg="in PyTorch"
        )
        save_keras(back, optimizer, ours, path, **options)
        again = restored(job, K, generation, back)
        assert int(again.optimizer.iterations) == BEFORE + HERE
        losses = train_keras(job, again, after)
        np.testing.assert_allclose(losses, train(job, ours, optimizer, after), rtol=TOLERANCE, err_msg="back in Keras")
        np.testing.assert_allclose(losses, train_keras(job, theirs, after), rtol=TOLERANCE, err_msg="all in Keras")
    return report


def compiled(job: Job, K: Any, generation: str) -> Any:
    """The model of Keras, with an optimizer that has seen its weights."""
    K.utils.set_random_seed(0)
    model = job.keras(K)
    model.compile(optimizer=optimizer_of(K, generation, **OPTIONS), loss="mse")
    if generation != "legacy":
        model.optimizer.build(model.trainable_variables)
    return model


def train_keras(job: Job, model: Any, batches: list[Batch]) -> list[float]:
    """The losses of steps in Keras."""
    variables = model.trainable_variables
    # Those of Keras 3 wrap the variables of TensorFlow.
    raw = [variable if isinstance(variable, tf.Variable) else variable.value for variable in variables]

    @tf.function
    def step(inputs: Any, targets: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = model(inputs[0] if len(inputs) == 1 else inputs, training=True)
            loss = job.keras_loss(outputs, targets)
        model.optimizer.apply_gradients(zip(tape.gradient(loss, raw), variables, strict=True))
        return loss

    return [float(step([tf.constant(x) for x in inputs], tf.constant(targets))) for inputs, targets in batches]


def save(model: Any, path: Path) -> None:
    """Saves a model with its optimizer in the kind of file that the name says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_weights(path) if path.name.endswith(".weights.h5") else model.save(path)


def restored(job: Job, K: Any, generation: str, path: Path) -> Any:
    """A model that Keras makes from a file, with its optimizer."""
    if generation == "keras3":
        model = compiled(job, K, generation)
        model.load_weights(path)
        return model
    options = {"safe_mode": False} if generation == "new" else {}
    return K.models.load_model(path, custom_objects=job.custom_objects(K), **options)


def load(job: Job, path: Path, **options: Any) -> tuple[nn.Module, AdadeltaKeras, Report]:
    """The job in PyTorch."""
    torch.manual_seed(0)
    model = job.torch().double()
    params = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    optimizer = AdadeltaKeras(params, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(not in the file|rows that a batch uses)")
        report = load_keras(path, optimizer, model, weights=True, **options)
    return model, optimizer, report


def train(job: Job, model: nn.Module, optimizer: AdadeltaKeras, batches: list[Batch]) -> list[float]:
    """The losses of steps in PyTorch."""
    job.mode(model)
    losses = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = job.torch_loss(model(*[torch.from_numpy(x) for x in inputs]), torch.from_numpy(targets))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
