"""Writes the state, the weights and the hyperparameters of now into a copy of a file of Keras."""

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from torch_adadelta.keras import additions, hdf5, keras2, matching
from torch_adadelta.keras.checkpoints import opened
from torch_adadelta.keras.config import CLIPPING, IDLE, SLOT_OF, dropped_options, inner_optimizer
from torch_adadelta.keras.contents import KERAS2, KERAS3, Checkpoint, dropped
from torch_adadelta.keras.correspondence import Match
from torch_adadelta.keras.errors import Array, LazyArray
from torch_adadelta.keras.layouts import row_of, shape_of
from torch_adadelta.keras.modules import params_of
from torch_adadelta.keras.numbered import WEIGHTS
from torch_adadelta.keras.report import Report
from torch_adadelta.keras.transfer import check_arguments, check_coverage, rows_of
from torch_adadelta.optimizer import AdadeltaKeras
from torch_adadelta.options import BY_NAME
from torch_adadelta.step import averages


def save_keras(
    path: str | Path,
    optimizer: AdadeltaKeras,
    model: nn.Module,
    template: str | Path,
    *,
    weights: bool = True,
    hyperparameters: bool = True,
    mapping: Mapping[str, Any] | None = None,
    match: str = "auto",
    flatten: str | Mapping[str, Any] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    state_order: Sequence[str] | None = None,
    drop: Collection[str] = (),
) -> Report:
    """Writes a copy of a Keras file with the current state, weights and hyperparameters, so that Keras continues.

    Args:
        path (str or Path): the file to write. It is written beside its target and renamed when it is complete. It may
            be `template`.
        optimizer (AdadeltaKeras): has the state and the hyperparameters. A parameter without state is written with
            zeros.
        model (nn.Module): has the weights.
        template (str or Path): a ``.h5``, ``.keras`` or ``.weights.h5`` file of the same model with the state of an
            Adadelta, such as the file that was loaded. TensorFlow checkpoints cannot be written.
        weights (bool, optional): False keeps the weights of the template. (default: True)
        hyperparameters (bool, optional): False keeps the hyperparameters of the template. True writes those for which
            the file has a place; the `Report` names the others. (default: True)
        mapping (dict, optional): as for `load_keras`. (default: None)
        match (str, optional): as for `load_keras`. (default: "auto")
        flatten (str or dict, optional): as for `load_keras`. (default: None)
        config (str, Path or dict, optional): as for `load_keras`. (default: None)
        state_order (sequence of str, optional): as for `load_keras`. (default: None)
        drop (collection of str, optional): what may be left out. (default: ())

            - ``"ema"`` and ``"gradient_accumulation"``: moving averages and sums of gradients, with their options, that
              only the optimizer or only the template has. They are removed from the copy; compile Keras without them.
            - ``"weight_decay"`` and ``"exclusions"``: weight decay that Keras cannot express. Keras has one decoupled
              `weight_decay` for all parameters, and no file holds exclusions.

    Returns:
        A `Report` of what was written.

    Raises:
        ValueError: the template is a TensorFlow checkpoint; only one of the template and the optimizer has a schedule;
            or the optimizer has options that this Keras does not have.

    The errors of `load_keras` are raised too. After any error, `path` is as before.
    """
    check_arguments(optimizer, model)
    if set(drop) - {*additions.DROPPABLE_ON_SAVE, *IDLE}:
        raise ValueError(f"drop must be a set of {', '.join(additions.DROPPABLE_ON_SAVE)}; got {drop!r}")
    path, template = Path(path), Path(template)
    uses = additions.uses(optimizer)
    unused = [name for name in SLOT_OF if name in drop and name not in uses]
    with opened(template, config, unused, state_order, uses) as checkpoint:
        if checkpoint.format == "TensorFlow checkpoint":
            raise ValueError(f"{template} is a TensorFlow checkpoint, which is not written; use a .h5 or .keras file")
        found = matching.match(checkpoint, model, mapping, match, flatten)
        check_coverage(found, checkpoint, optimizer, weights=False)
        notes: list[str] = []
        left_out = additions.check_places(checkpoint, optimizer, drop, hyperparameters)
        arrays = _arrays(found, optimizer, weights)
        count = int(optimizer.param_groups[0]["iterations"])
        if checkpoint.iterations is not None:
            arrays[checkpoint.iterations.name] = np.asarray(count, checkpoint.iterations.dtype)
        elif count:
            notes.append(f"the file has no place for iterations={count}; this Keras goes on from 0, its decay too")
        # What is written into the configuration; what is taken out has its defaults there.
        options: dict[str, Any] = {name: additions.DEFAULTS[name] for name in dropped_options(left_out.theirs)}
        written: dict[str, Any] = {}
        if hyperparameters:
            values = _written_values(checkpoint, optimizer, drop, left_out.ours, notes)
            if checkpoint.learning_rate is not None and "learning_rate" in values:
                arrays[checkpoint.learning_rate.name] = np.asarray(
                    values["learning_rate"], checkpoint.learning_rate.dtype
                )
                written["learning_rate"] = values["learning_rate"]
            if "epsilon" in checkpoint.hyperparameters:
                options = written = values | options
            needed = [name for name, default in additions.DEFAULTS.items() if values.get(name, default) != default]
            missing = [name for name in ("learning_rate", "rho", "epsilon", *needed) if name not in written]
            if missing:
                notes.append(f"the file has no place for {', '.join(missing)}; give them to Keras when you compile")
        removed = [name for slot in left_out.theirs for name in checkpoint.optional[SLOT_OF[slot]]]
        arrays = {name: array for name, array in arrays.items() if name not in removed}
        copies = checkpoint.copies
        changes = Changes(
            arrays | {copies[name]: array for name, array in arrays.items() if name in copies},
            [*removed, *(copies[name] for name in removed if name in copies)],
            options,
        )
        notes += dropped([*left_out.ours, *left_out.theirs])
        source = f"{path}: {checkpoint.source}"
    _write(path, template, checkpoint.format, changes)
    return Report(source, optimizer.iterations, written, rows_of(found), notes)


def _arrays(found: Match, optimizer: AdadeltaKeras, weights: bool) -> dict[str, Array]:
    """What to write, by the names of the datasets."""
    arrays: dict[str, Array] = {}
    of_params = dict(optimizer.master_params()) if weights else {}
    trained = params_of(optimizer)
    for transfer in found.transfers:
        # A parameter that is frozen, and not in the optimizer, keeps the state in the template.
        keys = [*(transfer.variable.slots if transfer.tensor in trained else ()), *(["value"] if weights else [])]
        for key in keys:
            stored: LazyArray = getattr(transfer.variable, key)
            state = optimizer.state.get(transfer.tensor, {})
            if key == "value":
                tensor = of_params.get(transfer.tensor, transfer.tensor)
            elif key in state:
                tensor = state[key]
            elif key == averages.KEY and not transfer.tensor.requires_grad and transfer.row is None:
                continue  # that of the template stays
            else:
                tensor = optimizer.initial_state(transfer.tensor, key)
            tensor = tensor.detach().cpu()
            array = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
            if transfer.first is not None:
                array = array[slice(*transfer.rows)]
            array = transfer.layout.to_keras(array, shape_of(stored.shape, transfer.row))
            if transfer.row is None:
                arrays[stored.name] = stored.as_stored(array)
            else:
                row_of(arrays.setdefault(stored.name, np.zeros(stored.shape, array.dtype)), transfer.row)[...] = array
    return arrays


def _written_values(
    checkpoint: Checkpoint,
    optimizer: AdadeltaKeras,
    drop: Collection[str],
    left_out: Collection[str],
    notes: list[str],
) -> dict[str, Any]:
    """The hyperparameters as Keras has them in its configuration."""
    values = {"decay": 0.0, **optimizer.get_config()}
    for name in ("name", "weight_decay", "decoupled_weight_decay", *dropped_options(left_out)):
        values.pop(name, None)
    values |= additions.written_weight_decay(checkpoint, optimizer, drop, notes)
    factor = values.get("loss_scale_factor")
    if checkpoint.generation != KERAS3 and factor is not None:
        raise ValueError(
            f"the optimizer has loss_scale_factor={factor!r}, which this Keras does not have; set it to None"
        )
    if not checkpoint.generation.has_global_clipnorm and values.get("global_clipnorm") is not None:
        raise ValueError(
            f"the optimizer has global_clipnorm={values['global_clipnorm']!r}, which this Keras does not have; pass "
            "hyperparameters=False"
        )
    is_scheduled = isinstance(checkpoint.hyperparameters.get("learning_rate"), dict) or (
        checkpoint.generation == KERAS3 and checkpoint.learning_rate is None
    )
    if isinstance(values["learning_rate"], dict) != is_scheduled and "learning_rate" in checkpoint.hyperparameters:
        ours = "a schedule" if isinstance(values["learning_rate"], dict) else "a number"
        raise ValueError(
            f"the learning rate of the optimizer is {ours}, and that of {checkpoint.path} is not; save a template with "
            "Keras that has the same kind, or pass hyperparameters=False"
        )
    generation = checkpoint.generation
    clipping = [name for name in CLIPPING if values.get(name) is not None]
    if generation.has_zero and any(values[name] == 0 for name in clipping):
        name = next(name for name in clipping if values[name] == 0)
        raise ValueError(f"the optimizer has {name}=0, which means no clipping in this Keras; set it to None")
    if len(clipping) > 1 and generation.is_norm_first:
        raise ValueError(
            f"the optimizer has {' and '.join(clipping)}, and clips by value first, where this Keras clips by the norm "
            "first; pass hyperparameters=False"
        )
    if len(clipping) > 1 and generation.has_additions:
        raise ValueError(
            f"the optimizer has {' and '.join(clipping)}, of which this Keras takes one only; pass "
            "hyperparameters=False"
        )
    if not generation.has_decay:
        if values["decay"]:
            raise ValueError(
                f"the optimizer has decay={values['decay']!r}, which this Keras does not have; use a schedule"
            )
        del values["decay"]
    if generation.has_additions:
        values = {**additions.DEFAULTS, **values}
    else:  # all that is left of averages are options without use_ema
        values = {name: value for name, value in values.items() if not BY_NAME[name].is_keras3}
    if generation == KERAS2:
        values = keras2.as_keras2(values)
    return {"clipvalue": None, "clipnorm": None, "global_clipnorm": None, **values}


class Changes(NamedTuple):
    """What a copy of a file has that the file does not."""

    arrays: dict[str, Array]  # by the names of the datasets
    removed: list[str]  # datasets that it is without
    options: dict[str, Any]  # hyperparameters in the configuration


def _set_options(config: Any, values: dict[str, Any]) -> None:
    """Sets the hyperparameters in a configuration of an optimizer of Keras, in place."""
    options = inner_optimizer(config)["config"]
    for name, value in values.items():
        if name == "learning_rate" and "lr" in options:
            name = "lr"
        if value is None and name in CLIPPING:  # of which not every Keras knows None
            options.pop(name, None)
        elif isinstance(value, dict) and isinstance(options.get(name), dict):
            options[name] = {**options[name], "class_name": value["class_name"], "config": value["config"]}
        elif value is not None or name in options:
            options[name] = value


def _write(path: Path, template: Path, format: str, changes: Changes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        if format == ".keras":
            _write_zip(part, template, changes)
        else:
            shutil.copyfile(template, part)
            with hdf5.required().File(part, "r+") as file:
                _write_datasets(file, changes)
                if changes.options and "training_config" in file.attrs:
                    training = json.loads(file.attrs["training_config"])
                    _set_options(training["optimizer_config"], changes.options)
                    hdf5.set_text(file, "training_config", json.dumps(training))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(path if path.exists() else template, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _write_datasets(file: Any, changes: Changes) -> None:
    for name, array in changes.arrays.items():
        dataset = file[name]
        if dataset.dtype.kind not in "fiu":  # bfloat16, which NumPy does not know
            bits = torch.from_numpy(np.array(array)).to(torch.bfloat16).view(torch.int16).numpy()
            dataset[...] = bits.view(dataset.dtype)
        else:
            dataset[...] = array
    for name in changes.removed:
        del file[name]
    if "optimizer_weights" in file:
        _forget_removed(file["optimizer_weights"])
    else:
        for group in {name.rpartition("/")[0] for name in changes.removed}:
            for number, old in enumerate(sorted(file[group], key=int)):
                if old != str(number):  # the numbers before it are free
                    file.move(f"{group}/{old}", f"{group}/{number}")


def _forget_removed(group: Any) -> None:
    """Takes the names of datasets that are not there out of the list of them, which Keras may split over attributes."""
    for attribute in [name for name in group.attrs if name.startswith("weight_names")]:
        names = group.attrs[attribute]
        kept = [name for name in names if (name if isinstance(name, str) else name.decode()) in group]
        if len(kept) < len(names):
            group.attrs[attribute] = np.array(kept, dtype=names.dtype)


def _write_zip(part: Path, template: Path, changes: Changes) -> None:
    with zipfile.ZipFile(template) as old, zipfile.ZipFile(part, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename == WEIGHTS:
                buffer = BytesIO(data)
                with hdf5.required().File(buffer, "r+") as file:
                    _write_datasets(file, changes)
                data = buffer.getvalue()
            elif info.filename == "config.json" and changes.options:
                config = json.loads(data)
                if config.get("compile_config", {}).get("optimizer"):
                    _set_options(config["compile_config"]["optimizer"], changes.options)
                    data = json.dumps(config).encode()
            new.writestr(info.filename, data)
