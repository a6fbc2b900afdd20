"""What Keras 3 adds to Adadelta, in and out of files of Keras: what there must be, and what is said. Needs no Keras."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

pytest.importorskip("h5py", reason="needs the extra 'keras'")

import h5py
from keras_added import ADDED, CELLS, COUNT, KINDS, MODEL, gates, load
from keras_stored import DATA, build, edited, with_options, written_config
from keras_table import check, has_options, recorded

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import KerasFileError, load_keras, save_keras

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")


@pytest.mark.parametrize("generation", ADDED)
def test_files_with_all_of_it(generation: str, folder: Path) -> None:
    """Each state is there to the bit, further losses are those of Keras, and what is written back is what was there."""
    files = recorded(folder / generation)
    assert {*KINDS} <= {*files}
    check(MODEL, generation, files, np.load(folder / generation / "truth.npz"), **ADDED[generation])


@pytest.mark.parametrize(("generation", "kind"), [cell for cell in CELLS if not has_options(*cell)])
def test_state_that_the_optimizer_does_not_use_is_refused(generation: str, kind: str, folder: Path) -> None:
    for option, drop in (("use_ema", "ema"), ("gradient_accumulation_steps", "gradient_accumulation")):
        if option not in ADDED[generation]:
            continue
        own = {name: value for name, value in ADDED[generation].items() if name != option}
        message = rf"{option} of the AdadeltaKeras is (None|False)\. Give it.*drop=\{{'{drop}'\}}|does not say which"
        with pytest.raises(KerasFileError, match=message):
            load(folder, generation, kind, own)
    if generation == "keras3":  # after 5 calls, 0 or 2 gradients would be summed
        for n, message in ((5, "there are sums that are not zero"), (3, None)):
            own = {**ADDED[generation], "gradient_accumulation_steps": n}
            if message is None:
                assert load(folder, generation, kind, own)[1].iterations == COUNT // n
            else:
                with pytest.raises(KerasFileError, match=message):
                    load(folder, generation, kind, own)


def test_options_of_the_optimizer_are_kept_if_they_agree(folder: Path, tmp_path: Path) -> None:
    for n, message in (
        (2, None),
        (4, None),
        (3, "gradients of 1 are summed, which is another number"),
        (5, "another num"),
    ):
        own = {"use_ema": True, "gradient_accumulation_steps": n, "weight_decay": 0.125}
        if message is not None:
            with pytest.raises(KerasFileError, match=message):
                load(folder, "keras3", "h5", own, hyperparameters=False)
            continue
        _, optimizer, _ = load(folder, "keras3", "h5", own, hyperparameters=False)
        assert (optimizer.ema_momentum, optimizer.gradient_accumulation_steps) == (0.99, n)
        assert (optimizer.weight_decay, optimizer.iterations) == (0.125, COUNT // n)
    for steps in (-2, "two"):  # which say nothing
        path = tmp_path / "m.h5"
        path.write_bytes((folder / "keras3" / "model.h5").read_bytes())
        with h5py.File(path, "r+") as file:
            with_options(gradient_accumulation_steps=steps)(file)
        model, optimizer = gates(use_ema=True, gradient_accumulation_steps=2)
        load_keras(path, optimizer, model, hyperparameters=False)
        assert optimizer.iterations == 2
    for own in ({}, {"use_ema": True}, {"gradient_accumulation_steps": 2}):
        with pytest.raises(KerasFileError, match="Give it the option as Keras had it"):
            load(folder, "keras3", "h5", own, hyperparameters=False)


def test_sums_that_should_be_there_are_asked_for(tmp_path: Path) -> None:
    """Files without averages and sums, for optimizers that have these options."""
    for name in ("k3.weights.h5", "k3.h5", "tf24_tfck/w"):  # after 4 calls
        options: dict[str, Any] = {"hyperparameters": False} if name == "k3.h5" else {}
        for n in (2, 3):
            model, optimizer = build(gradient_accumulation_steps=n, use_ema=True)
            if n == 3:
                with pytest.raises(
                    KerasFileError, match="after 4 calls, gradient_accumulation_steps=3 makes some grad"
                ):
                    load_keras(DATA / name, optimizer, model, **options)
                continue
            report = load_keras(DATA / name, optimizer, model, **options)
            assert (optimizer.iterations, report.iterations) == (2, 2)
            assert "no moving averages were read: they begin as the parameters" in report.notes
            assert "average" not in optimizer.state[model[0].weight]
    # With the configuration, it is that of the file.
    model, optimizer = build(gradient_accumulation_steps=3, use_ema=True, weight_decay=0.5, loss_scale_factor=2.0)
    report = load_keras(DATA / "k3.h5", optimizer, model)
    assert optimizer.gradient_accumulation_steps is optimizer.loss_scale_factor is None
    assert (optimizer.use_ema, optimizer.weight_decay, optimizer.iterations) == (False, 0.0, 4)
    changed_options = {"use_ema", "weight_decay", "gradient_accumulation_steps", "loss_scale_factor"}
    assert changed_options <= report.hyperparameters.keys()
    assert "ema_momentum" not in report.hyperparameters  # which nobody gave


def test_the_report(folder: Path) -> None:
    _, _, report = load(folder, "keras3", "h5", {})
    assert report.iterations == 2
    text = str(report)
    for line in (
        "iterations: 2",
        "weight_decay: 0.02",
        "ema_overwrite_frequency: 3",
        "note: 5 calls with gradient_accumulation_steps=2: the gradients of 1 are summed",
        "note: the weights in a file that was saved after fit are the moving averages",
    ):
        assert f"\n{line}" in text
    assert "decoupled_weight_decay" not in text
    assert "begin as the weights before training" not in text
    text = str(load(folder, "new", "h5", {})[2])
    assert "note: moving averages of this Keras begin as the weights before training" in text
    assert "calls with" not in text


def test_exclusions_from_weight_decay_are_asked_for(folder: Path) -> None:
    message = r"all parameters get weight_decay=0\.02.*call optimizer\.exclude_from_weight_decay before load_keras"
    path = folder / "new" / "model.h5"
    model, optimizer = gates()
    with pytest.warns(UserWarning, match=message):
        report = load_keras(path, optimizer, model)
    assert any("exclude_from_weight_decay" in note for note in report.notes)
    model, optimizer = gates()
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_keras(path, optimizer, model)
        load_keras(path, optimizer, model, hyperparameters=False)
    assert optimizer.param_groups[0]["excluded_from_weight_decay"] is not None


def test_what_the_file_cannot_confirm(folder: Path) -> None:
    own = {**ADDED["keras3"], "learning_rate": 0.5}
    notes = load(folder, "keras3", "weights.h5", own)[2].notes
    (note,) = [note for note in notes if "not in the file, so that" in note]
    listed = (
        "weight_decay=0.02, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=3, gradient_accumulation_steps=2"
    )
    assert f"{listed}, loss_scale_factor=2.0; see that" in note
    model, optimizer = build(ema_momentum=0.5)  # which does nothing
    (note,) = load_keras(DATA / "k3.weights.h5", optimizer, model).notes
    assert "momentum" not in note
    assert "and no weight decay" in note


# ---- To Keras --------------------------------------------------------------------------------------------------------


def test_what_keras_cannot_express_is_refused_or_dropped(tmp_path: Path) -> None:
    back = tmp_path / "m.h5"

    def with_groups(*decays: float) -> tuple[nn.Module, AdadeltaKeras]:
        model, _ = build()
        groups = [{"params": list(m.parameters()), "weight_decay": d} for m, d in zip(model, decays, strict=True)]
        return model, AdadeltaKeras(groups)

    excluding = build(weight_decay=0.25)
    excluding[1].exclude_from_weight_decay([excluding[0][0].bias])
    coupled_in_part = with_groups(0.25, 0.25)
    coupled_in_part[1].param_groups[1]["decoupled_weight_decay"] = False
    for (model, optimizer), drop, message, written in (
        (excluding, "exclusions", "some parameters are excluded from weight decay", 0.25),
        (with_groups(0.25, 0.0), "exclusions", "some parameters are excluded from weight decay", 0.25),
        (with_groups(0.0, 0.25), "exclusions", "some parameters are excluded from weight decay", 0.25),
        (coupled_in_part, "weight_decay", "decoupled_weight_decay=False, which Keras does not have", None),
        (with_groups(0.25, 0.5), "weight_decay", "weight_decay=0.25 and 0.5 in its groups, where Keras has one", None),
        (
            build(weight_decay=0.25, decoupled_weight_decay=False),
            "weight_decay",
            "decoupled_weight_decay=False, which Keras does not have",
            None,
        ),
    ):
        for too_few in ((), {"ema", "exclusions", "weight_decay"} - {drop}):
            with pytest.raises(ValueError, match=f"{message}.*drop={{'{drop}'}}"):
                save_keras(back, optimizer, model, DATA / "k3.h5", drop=too_few)
            assert not back.exists()
        save_keras(tmp_path / "state.h5", optimizer, model, DATA / "k3.h5", hyperparameters=False)
        report = save_keras(back, optimizer, model, DATA / "k3.h5", drop={drop})
        assert written_config(back)["weight_decay"] == written
        assert "decoupled_weight_decay" not in written_config(back)
        assert [note for note in report.notes if note.startswith("left out: ")]
        back.unlink()
    model, optimizer = build(decoupled_weight_decay=False)  # of nothing
    save_keras(back, optimizer, model, DATA / "k3.h5")
    assert "decoupled_weight_decay" not in written_config(back)
    for wrong in ("ema", {"momentum"}):
        with pytest.raises(ValueError, match=r"drop must be a set of ema, .*, exclusions; got"):
            save_keras(back, optimizer, model, DATA / "k3.h5", drop=wrong)


def test_a_template_has_what_the_optimizer_has(folder: Path, tmp_path: Path) -> None:
    path = folder / "keras3" / "model.h5"
    for own, drop, message in (
        (
            {},
            {"gradient_accumulation"},
            r"has moving averages.*use_ema=False. Set optimizer\.use_ema; or pass drop={'ema'}",
        ),
        (
            {"use_ema": True},
            (),
            r"has gradient accumulation.*gradient_accumulation_steps=None.*{'gradient_accumulation'}",
        ),
    ):
        model, optimizer = gates(**own)
        with pytest.raises(ValueError, match=message):
            save_keras(tmp_path / "m.h5", optimizer, model, path, drop=drop)
    for template in ("k3.h5", "k3.keras", "k3.weights.h5", "new.h5"):
        for own, drop in (({"use_ema": True}, "ema"), ({"gradient_accumulation_steps": 2}, "gradient_accumulation")):
            model, optimizer = build(**own)
            message = (
                rf"no place for .*Save a template, after a step, with a Keras optimizer that has {next(iter(own))}.*"
            )
            with pytest.raises(ValueError, match=rf"{message}drop=\{{'{drop}'\}}"):
                save_keras(tmp_path / template, optimizer, model, DATA / template, hyperparameters=False)
            report = save_keras(tmp_path / template, optimizer, model, DATA / template, drop={drop})
            assert report.notes[-1].startswith("left out: ")
            if template == "k3.h5":
                written = written_config(tmp_path / template)
                assert (written["use_ema"], written["gradient_accumulation_steps"]) == (False, None)


def test_the_sums_fit_the_number_of_calls_in_the_template(folder: Path, tmp_path: Path) -> None:
    path = folder / "keras3" / "model.h5"
    model, optimizer = gates(use_ema=True, gradient_accumulation_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_keras(folder / "keras3" / "model.h5", optimizer, model)
    save_keras(tmp_path / "m.h5", optimizer, model, path, hyperparameters=False)
    optimizer.load_state_dict(
        {
            **optimizer.state_dict(),
            "param_groups": [{**optimizer.state_dict()["param_groups"][0], "gradient_accumulation_steps": 3}],
        }
    )  # 5 calls of 3 are 2 more; of 2, 1 more
    with pytest.raises(ValueError, match="gradients of 2 are summed, which is another number with the gradient_accum"):
        save_keras(tmp_path / "m.h5", optimizer, model, path, hyperparameters=False)
    save_keras(tmp_path / "m.h5", optimizer, model, path)
    assert written_config(tmp_path / "m.h5")["gradient_accumulation_steps"] == 3


def test_the_legacy_class_knows_none_of_it(tmp_path: Path) -> None:
    back = tmp_path / "m.h5"
    for options, message in (
        ({"weight_decay": 0.25}, r"weight_decay=0\.25, which this Keras does not have. Pass drop=\{'weight_decay'\}"),
        ({"use_ema": True}, r"use_ema=True, and .*no place for moving averages.*drop=\{'ema'\}"),
        ({"gradient_accumulation_steps": 2}, r"no place for gradient accumulation.*drop=\{'gradient_accumulation'\}"),
        ({"loss_scale_factor": 2.0}, "loss_scale_factor=2.0, which this Keras does not have"),
    ):
        model, optimizer = build(**options)
        with pytest.raises(ValueError, match=message):
            save_keras(back, optimizer, model, DATA / "tf24.h5")
        assert not back.exists()
    model, optimizer = build(
        weight_decay=0.25, use_ema=True, ema_momentum=0.5, gradient_accumulation_steps=2, ema_overwrite_frequency=2
    )
    template = edited(tmp_path, with_options(decay=0.5))
    drop = {"ema", "weight_decay", "gradient_accumulation"}
    report = save_keras(back, optimizer, model, template, drop=drop)
    assert sum("left out: " in note for note in report.notes) == 3
    config = written_config(back)
    assert not {"weight_decay", "use_ema", "gradient_accumulation_steps"} & config.keys()
    assert config["decay"] == 0.0  # not that of the template
    load_keras(back, optimizer, model)
    assert not optimizer.use_ema
