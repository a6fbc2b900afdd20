"""The table of files, written by a running Keras, which goes on with what is written back; see keras_table.py."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

pytest.importorskip("tensorflow", reason="needs the extra 'parity'")
pytest.importorskip("tf_keras", reason="needs the extra 'parity'")
pytest.importorskip("keras", reason="needs the extra 'parity'")

import keras_table_models as models
from keras_table import ROWS, TOLERANCE, Job, check, loaded, train

from torch_adadelta.keras import save_keras
from torch_adadelta.keras.config import dropped_options

pytestmark = pytest.mark.xdist_group("tensorflow")

GENERATIONS: Final = ("legacy", "new", "keras3")

# Which files Keras goes on with. Keras 3 does not restore the optimizer from its own .h5: it builds it for no variables.
RESTORED: Final = {"legacy": ("h5",), "new": ("h5", "keras", "weights.h5"), "keras3": ("keras", "weights.h5")}
# Nor does the new class, with a LossScaleOptimizer around it.
UNRESTORED: Final = {("new", "h5", "loss scaled")}

STEPS: Final = 3

EXACT: Final = [name for name in models.LIVE if name != "bfloat16"]  # whose layers compute in float64


@pytest.fixture(autouse=True)
def _unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """These files are ours: no process has to look first whether HDF5 survives them."""
    monkeypatch.setattr("torch_adadelta.keras.hdf5.read_in_sandbox", lambda path, data=None: None)


# The others have been recorded.
@pytest.mark.parametrize("name", [*models.LIVE, *(pytest.param(name, marks=pytest.mark.slow) for name in ROWS)])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_table(generation: str, name: str, tmp_path: Path) -> None:
    if name == "channels first" and not models.has_channels_first():
        pytest.skip("TensorFlow has no convolution with the channels first on this processor")
    models.write(generation, name, tmp_path)
    kinds = [kind for kind in models.KINDS[generation] if (generation, kind, name) not in models.UNWRITTEN]
    check(name, generation, {kind: models.path_of(kind, tmp_path) for kind in kinds}, np.load(tmp_path / "truth.npz"))


class Both:
    """A job in Keras, trained for some steps and saved; and what PyTorch loads of it."""

    def __init__(self, K: Any, generation: str, name: str, folder: Path, **options: Any) -> None:
        self.K, self.generation, self.name, self.folder = K, generation, name, folder
        self.keras, self.data = models.job(K, generation, name, 4 * STEPS, **options)
        self.train_keras(0)

    def part(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return self.data[number * STEPS : (number + 1) * STEPS]

    def train_keras(self, number: int, model: Any = None) -> list[float]:
        return models.trained(self.keras if model is None else model, self.generation, self.part(number))

    def train(self, job: Job, number: int) -> list[float]:
        return train(job, *zip(*self.part(number), strict=True))

    def save(self, kind: str) -> Path:
        return models.save(self.keras, kind, self.folder)

    def load(self, path: Path, kind: str, model: Any = None, **given: Any) -> Job:
        truth = {"config": (self.keras if model is None else model).to_json(), "y": self.data[0][1]}
        job = loaded(self.name, self.generation, kind, path, truth, **given)[1]
        assert job is not None
        return job

    def assert_close(self, ours: list[float], theirs: list[float]) -> None:
        assert ours == pytest.approx(theirs, rel=TOLERANCE[self.generation])


@pytest.mark.parametrize(
    "name",
    [
        *("chain", "loss scaled"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("recurrent", "attention", "nested", *EXACT)),
    ],
)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_keras_goes_on_with_our_file(generation: str, name: str, tmp_path: Path) -> None:
    with models.precision(generation, name) as K:
        both = Both(K, generation, name, tmp_path)
        for kind in RESTORED[generation]:
            if (generation, kind, name) in UNRESTORED:
                continue
            path = both.save(kind)
            ours = both.load(path, kind)
            both.train(ours, 1)
            back = tmp_path / f"back.{kind}"
            save_keras(back, ours.optimizer, ours.model, path, **ours.options)
            theirs = models.restored(K, back, kind, generation, name)
            assert int(theirs.optimizer.iterations) == 2 * STEPS
            for number in (2, 3):
                both.assert_close(both.train(ours, number), both.train_keras(number, theirs))


# After three calls, and after six, some gradients wait for their update.
ADDED: Final[dict[str, dict[str, Any]]] = {
    generation: {**options, "ema_overwrite_frequency": 2} for generation, options in models.ADDED.items()
}
ADDED["keras3"]["gradient_accumulation_steps"] = 4


@pytest.mark.parametrize("name", ["gates", *(pytest.param(n, marks=pytest.mark.slow) for n in ("chain", "attention"))])
@pytest.mark.parametrize("generation", ADDED)
def test_keras_goes_on_with_averages_sums_and_weight_decay(generation: str, name: str, tmp_path: Path) -> None:
    options = ADDED[generation]
    with models.precision(generation, name) as K:
        both = Both(K, generation, name, tmp_path, **options)
        files = {kind: both.save(kind) for kind in (*RESTORED[generation], "checkpoint")}
        losses = both.train_keras(1)
        for kind, path in files.items():
            ours = both.load(path, kind, **options)
            both.assert_close(both.train(ours, 1), losses)
            if kind == "checkpoint":  # which is not written
                continue
            back = tmp_path / f"back.{kind}"
            save_keras(back, ours.optimizer, ours.model, path, **ours.options)
            theirs = models.restored(K, back, kind, generation, name, **options)
            assert int(theirs.optimizer._iterations) == 2 * STEPS
            for key, array in models.state_of(theirs, generation).items():
                states = [state[key].flatten() for state in ours.optimizer.state.values()]
                np.testing.assert_array_equal(np.sort(torch.cat(states).numpy()), array, err_msg=key)
            for number in (2, 3):
                both.assert_close(both.train(ours, number), both.train_keras(number, theirs))


@pytest.mark.parametrize("name", ["gates", pytest.param("loss scaled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("drop", [{"ema"}, {"gradient_accumulation"}, {"ema", "gradient_accumulation", "weight_decay"}])
@pytest.mark.parametrize("generation", ADDED)
def test_keras_goes_on_without_what_was_dropped(generation: str, drop: set[str], name: str, tmp_path: Path) -> None:
    options = {key: value for key, value in ADDED[generation].items() if key != "loss_scale_factor"}
    kept = {key: value for key, value in options.items() if key not in dropped_options(drop)}
    if kept == options:  # of the new class, which does not have it
        return
    with models.precision(generation, name) as K:
        both = Both(K, generation, name, tmp_path, **options)
        for kind in RESTORED[generation]:
            if (generation, kind, name) in UNRESTORED:
                continue
            path = both.save(kind)
            ours = both.load(path, kind, drop=drop, **kept)
            both.train(ours, 1)
            back = tmp_path / f"back.{kind}"
            save_keras(back, ours.optimizer, ours.model, path, drop=drop, **ours.options)
            theirs = models.restored(K, back, kind, generation, name, **kept)
            optimizer = getattr(theirs.optimizer, "inner_optimizer", theirs.optimizer)
            assert optimizer.use_ema == ("ema" not in drop)
            assert int(optimizer._iterations) == 2 * STEPS
            for key, array in models.state_of(theirs, generation).items():
                states = [state[key].flatten() for state in ours.optimizer.state.values()]
                np.testing.assert_array_equal(np.sort(torch.cat(states).numpy()), array, err_msg=key)
            for number in (2, 3):
                both.assert_close(both.train(ours, number), both.train_keras(number, theirs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recurrent", "attention"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_clipnorm_takes_the_norms_of_keras(generation: str, name: str, tmp_path: Path) -> None:
    """Also where one weight of Keras is two parameters, and where three are one."""
    with models.precision(generation, name) as K:
        both = Both(K, generation, name, tmp_path, clipnorm=0.05)
        path = both.save("h5")
        ours, of_parameters = both.load(path, "h5"), both.load(path, "h5")
        state = ours.optimizer.state_dict()  # through which the norms come, too
        ours.optimizer.norm_variables = of_parameters.optimizer.norm_variables = None
        ours.optimizer.load_state_dict(state)
        for number in (1, 2, 3):
            losses = both.train_keras(number)
            both.assert_close(both.train(ours, number), losses)
            assert both.train(of_parameters, number)[1:] != pytest.approx(losses[1:], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_rows_of_an_embedding_that_a_batch_does_not_use_are_as_in_keras(generation: str, tmp_path: Path) -> None:
    """The legacy class leaves them, the others let their averages decay."""
    with models.precision(generation, "tokens") as K:
        both = Both(K, generation, "tokens", tmp_path)
        ours = both.load(both.save("h5"), "h5")
        weight = ours.model.embed.weight
        ours.model.embed.sparse = generation == "legacy"
        before = ours.optimizer.state[weight]["square_avg"].clone()
        both.data = [(x[:, :3], y) for x, y in both.data]
        unused = np.setdiff1d(np.arange(models.TOKENS), [x for x, _ in both.part(1)])
        assert before[unused].any()
        both.assert_close(both.train(ours, 1), both.train_keras(1))
        both.assert_close(both.train(ours, 2), both.train_keras(2))
        expected = both.load(both.save("h5"), "h5").optimizer.state
        actual = ours.optimizer.state[weight]["square_avg"].numpy()
        expected = next(s["square_avg"] for p, s in expected.items() if p.shape == weight.shape).numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-16)


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_schedule_comes_over_and_goes_back(generation: str, tmp_path: Path) -> None:
    with models.precision(generation, "chain") as K:
        schedule = K.optimizers.schedules.ExponentialDecay(0.5, 3, 0.7, staircase=True)
        both = Both(K, generation, "chain", tmp_path, learning_rate=schedule)
        path = both.save("h5")
        ours = both.load(path, "h5")
        assert ours.optimizer.learning_rate.initial_learning_rate == 0.5
        both.assert_close(both.train(ours, 1), both.train_keras(1))
        save_keras(tmp_path / "back.h5", ours.optimizer, ours.model, path)
        if "h5" in RESTORED[generation]:
            again = K.models.load_model(str(tmp_path / "back.h5"))
            assert int(again.optimizer.iterations) == 2 * STEPS
            assert again.optimizer.get_config()["learning_rate"]["config"]["decay_rate"] == 0.7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("generation", "name"), [("legacy", "tokens"), ("legacy", "loss scaled"), ("new", "loss scaled")]
)
def test_a_saved_model_is_read(generation: str, name: str, tmp_path: Path) -> None:
    with models.precision(generation, name) as K:
        both = Both(K, generation, name, tmp_path)
        both.keras.save(str(tmp_path / "saved"), save_format="tf")
        ours = both.load(tmp_path / "saved", "checkpoint")
        assert ours.optimizer.iterations == STEPS
        both.assert_close(both.train(ours, 1), both.train_keras(1))
