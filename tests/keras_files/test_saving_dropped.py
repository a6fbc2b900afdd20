"""`save_keras` with ``drop``: what the template has and the optimizer does not is taken out of the copy. Needs no Keras."""

import warnings
from pathlib import Path
from typing import Final

import pytest
import torch

pytest.importorskip("h5py", reason="needs the extra 'keras'")

import h5py
from keras_added import ADDED, CELLS, COUNT, STATE, config_of, gates, load
from keras_stored import datasets, written_config
from keras_table import has_options, recorded

from torch_adadelta.keras import additions, load_keras, save_keras
from torch_adadelta.keras.config import DROPPABLE, OPTIONS_OF, SLOT_OF, dropped_options

pytestmark = pytest.mark.filterwarnings("ignore:.*not in the file, so that training goes on")


WEIGHTS: Final = 5  # of the model in Keras

DROPS: Final = ({"ema"}, {"gradient_accumulation"}, {"ema", "gradient_accumulation", "weight_decay"})


@pytest.mark.parametrize("has_hyperparameters", [True, False])
@pytest.mark.parametrize("drop", DROPS, ids=range(3))
@pytest.mark.parametrize(("generation", "kind"), [cell for cell in CELLS if cell[1] != "checkpoint"])
def test_what_was_dropped_is_taken_out_of_a_copy(
    generation: str, kind: str, drop: set[str], has_hyperparameters: bool, folder: Path, tmp_path: Path
) -> None:
    """The copy is a file of Keras without them: it loads without `drop`, its numbers and names have no gaps."""
    own = {key: value for key, value in ADDED[generation].items() if key not in dropped_options(drop)}
    if own == ADDED[generation]:
        return
    model, optimizer, _ = load(folder, generation, kind, own, drop=drop)
    template, back = recorded(folder / generation)[kind], tmp_path / f"back.{kind}"
    options = {} if kind in ("h5", "keras") else {"config": config_of(folder, generation)}
    report = save_keras(back, optimizer, model, template, drop=drop, hyperparameters=has_hyperparameters, **options)
    slots = [SLOT_OF[name] for name in SLOT_OF if name in drop and SLOT_OF[name] in STATE[generation]]
    if (generation, kind) == ("keras3", "h5"):
        assert [note for note in report.notes if note.startswith("left out: ")] == [
            f"left out: {DROPPABLE[name]}" for name in SLOT_OF if name in drop
        ]
    assert len(datasets(template)) - len(datasets(back)) == len(slots) * WEIGHTS
    if has_options(generation, kind):
        written, before = written_config(back), written_config(template)
        for name in SLOT_OF:
            option = OPTIONS_OF[name][0]
            if option in before:
                assert written[option] == (additions.DEFAULTS[option] if name in drop else before[option])
        assert written["weight_decay"] == (None if "weight_decay" in drop and has_hyperparameters else 0.02)
    again, other = gates(**(own | ({} if has_hyperparameters else {"weight_decay": 0.02})))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exclude_from_weight_decay")
        load_keras(back, other, again, weights=True, **options)
    for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert [*other.state[theirs]] == [slot for slot in STATE[generation] if slot not in slots]
        assert all(torch.equal(tensor, optimizer.state[ours][key]) for key, tensor in other.state[theirs].items())
    assert other.param_groups[0]["iterations"] == COUNT


def test_a_list_of_names_that_is_split_stays_split(folder: Path, tmp_path: Path) -> None:
    """Keras splits an attribute that is too long for HDF5."""
    path = tmp_path / "m.h5"
    path.write_bytes(recorded(folder / "keras3")["h5"].read_bytes())
    with h5py.File(path, "r+") as file:
        attributes = file["optimizer_weights"].attrs
        names = attributes.pop("weight_names")
        attributes["weight_names0"], attributes["weight_names1"] = names[:9], names[9:]
    own = {key: value for key, value in ADDED["keras3"].items() if "ema" not in key}
    model, optimizer, _ = load(folder, "keras3", "h5", own, drop={"ema"})
    save_keras(tmp_path / "back.h5", optimizer, model, path, drop={"ema"})
    with h5py.File(tmp_path / "back.h5") as file:
        group = file["optimizer_weights"]
        assert "weight_names" not in group.attrs
        kept = [*group.attrs["weight_names0"], *group.attrs["weight_names1"]]
        assert kept == [name for name in names if not name.endswith("_average")]
        assert all(name in group for name in kept)
        assert group.attrs["weight_names0"].dtype == names.dtype
