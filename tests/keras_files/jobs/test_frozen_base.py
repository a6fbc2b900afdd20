"""A head is trained on a base that is frozen; then the base is thawed, in PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keras_jobs import (
    KINDS,
    OPTIONS,
    TOLERANCE,
    Batch,
    Job,
    check,
    compiled,
    optimizer_of,
    precision,
    save,
    train,
    train_keras,
)
from torch import Tensor, nn

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import load_keras


def keras_model(K: Any) -> Any:
    L = K.layers
    maps = [
        K.Input((6, 5, 2)),
        L.Conv2D(4, 3, padding="same", activation="relu"),
        L.BatchNormalization(epsilon=1e-3, momentum=0.9),
        L.Conv2D(4, 3, activation="relu"),
        L.GlobalAveragePooling2D(),
    ]
    base = K.Sequential(maps, name="base")
    base.trainable = False
    image = K.Input((6, 5, 2))
    return K.Model(image, L.Dense(1, name="head2")(L.Dense(8, activation="tanh", name="head1")(base(image))))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding="same"),
            nn.ReLU(),
            nn.BatchNorm2d(4, eps=1e-3, momentum=0.1),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(),
        ).requires_grad_(False)
        self.head1 = nn.Linear(4, 8)
        self.head2 = nn.Linear(8, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head2(self.head1(self.base(image.movedim(-1, 1)).mean((2, 3))).tanh())


def mode(model: Any) -> None:
    """Statistics of what is frozen stay as they are, as in Keras."""
    model.train()
    model.base.eval()


def batch(rng: np.random.Generator) -> Batch:
    return [rng.standard_normal((8, 6, 5, 2))], rng.standard_normal((8, 1))


JOB = Job(keras_model, Classifier, batch, mode=mode)


@pytest.mark.slow
@pytest.mark.parametrize("generation", KINDS)
def test_a_frozen_base(generation: str, tmp_path: Path) -> None:
    check(JOB, generation, tmp_path)


@pytest.mark.slow
def test_a_base_that_is_thawed(tmp_path: Path) -> None:
    """The older class makes state for what it trains from now on, and keeps that of the head; so does AdadeltaKeras."""
    rng = np.random.default_rng(0)
    batches = [batch(rng) for _ in range(50)]
    path = tmp_path / "job.h5"
    with precision("legacy", "") as K:
        theirs = compiled(JOB, K, "legacy")
        train_keras(JOB, theirs, batches[:10])
        save(theirs, path)
        model = Classifier().double()
        optimizer = AdadeltaKeras(model.named_parameters(), **OPTIONS)
        load_keras(path, optimizer, model, weights=True)

        theirs.get_layer("base").trainable = True
        model.base.requires_grad_(True)
        thawed = JOB._replace(mode=nn.Module.train)
        losses = train_keras(thawed, theirs, batches[10:])
        np.testing.assert_allclose(train(thawed, model, optimizer, batches[10:]), losses, rtol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")
@pytest.mark.parametrize("generation", ["new", "keras3"])
def test_a_base_that_is_thawed_for_another_optimizer(generation: str, tmp_path: Path) -> None:
    """The newer classes train what they were built for: Keras compiles the model anew, and so its state begins anew."""
    rng = np.random.default_rng(0)
    batches = [batch(rng) for _ in range(30)]
    path = tmp_path / f"job.{KINDS[generation]}"
    with precision(generation, "") as K:
        theirs = compiled(JOB, K, generation)
        train_keras(JOB, theirs, batches[:10])
        save(theirs, path)
        model = Classifier().double().requires_grad_(True)
        optimizer = AdadeltaKeras(model.named_parameters(), **OPTIONS)
        load_keras(path, optimizer, model, weights=True, state=False, config=theirs.to_json())
        assert not optimizer.state

        theirs.get_layer("base").trainable = True
        theirs.compile(optimizer=optimizer_of(K, generation, **OPTIONS), loss="mse")
        theirs.optimizer.build(theirs.trainable_variables)
        thawed = JOB._replace(mode=nn.Module.train)
        losses = train_keras(thawed, theirs, batches[10:])
        np.testing.assert_allclose(train(thawed, model, optimizer, batches[10:]), losses, rtol=TOLERANCE)
