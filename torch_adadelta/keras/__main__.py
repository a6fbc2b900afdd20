"""`python -m torch_adadelta.keras`: what a file of Keras holds, and its contents for PyTorch."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_adadelta.keras.checkpoints import opened
from torch_adadelta.keras.config import DROPPABLE, IDLE, SLOT_OF
from torch_adadelta.keras.contents import Checkpoint, explained
from torch_adadelta.keras.errors import NoStateError
from torch_adadelta.keras.flattening import FLATTEN, Flattening
from torch_adadelta.keras.layers import SLOTS, Layer, Variable
from torch_adadelta.keras.layouts import LayoutMismatch, WeightPlacement, row_of, same
from torch_adadelta.keras.matching import canonical
from torch_adadelta.options import OPTIONS


def table(checkpoint: Checkpoint, reason: str = "not read") -> str:
    """What a file holds, as text; with the reason, where that is without state."""
    count = str(checkpoint.count()) if checkpoint.has_state else "not in it"
    if checkpoint.has_state and checkpoint.iterations is None:
        count += ", for the file has none"
    lines = [f"{checkpoint.path}: {checkpoint.source}", f"iterations     {count}"]
    if not checkpoint.has_state:
        lines += [f"state          {reason}", f"optimizer      {checkpoint.optimizer or 'not known'}"]
    for name, value in _told(checkpoint).items():
        text = f"{value.get('class_name')} {value.get('config')}" if isinstance(value, dict) else repr(value)
        lines.append(f"{name:<14} {text}")
    missing = [name for name in ("learning_rate", "rho", "epsilon") if name not in checkpoint.hyperparameters]
    if missing:
        lines.append(f"not in it      {', '.join(missing)}")
    rows = [("weight", "shape", "dtype", "state", "class")]
    for layer, variable in checkpoint.variables():
        stored = variable.value
        state = ", ".join(variable.slots) or "none"
        rows.append(
            (
                f"{layer.path}/{variable.role}",
                str(stored.shape),
                str(stored.dtype),
                state,
                layer.class_name or "unknown",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += [f"note           {remark}" for remark in (*checkpoint.remarks, *checkpoint.notes)]
    lines.append("")
    for row in rows:
        lines.append("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join([*lines, *(f"note: {note}" for note in checkpoint.notes)])


def _told(checkpoint: Checkpoint) -> dict[str, Any]:
    """The hyperparameters, without what is the default of something that only Keras 3 has."""
    found = {option: checkpoint.hyperparameters.get(option.name) for option in OPTIONS}
    return {
        option.name: value
        for option, value in found.items()
        if value is not None and not (option.is_keras3 and value == option.default)
    }


def tensors(checkpoint: Checkpoint, flatten: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """The contents of a file by name, all Tensors, in the layouts of PyTorch's modules; and what stays as in Keras.

    The names are "iterations", those of the hyperparameters that are numbers, and "weights." or the
    key of a state before the path of a layer and the name that its module has for the parameter.
    """
    found = {} if checkpoint.iterations is None else {"iterations": torch.tensor(checkpoint.count())}
    for name, value in _told(checkpoint).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = torch.tensor(float(value), dtype=torch.float64)
    notes = []
    flattening = Flattening(checkpoint, flatten)
    for layer in checkpoint.layers:
        layer_name = layer.path.replace("/", ".")
        try:
            layout = canonical(layer, flattening)
        except LayoutMismatch as error:
            notes.append(f"{layer.path} stays in the layout of Keras: {error}")
            layout = [WeightPlacement(v.role, v.role.replace("/", "."), same(v.value.shape)) for v in layer.variables]
        for key in ("value", *SLOTS):
            for name, array in _parameters(checkpoint, layer, layout, key).items():
                prefix = "weights" if key == "value" else key
                found[f"{prefix}.{layer_name}.{name}"] = torch.from_numpy(array)
    return found, notes


def _parameters(checkpoint: Checkpoint, layer: Layer, layout: list[WeightPlacement], key: str) -> dict[str, Any]:
    """The weights of a layer, or their state, as arrays by the names of PyTorch's parameters."""
    by_role: dict[str, Variable] = {variable.role: variable for variable in layer.variables}
    parts: dict[str, list[Any]] = {}  # in the order of their rows
    for placement in layout:
        stored = getattr(by_role[placement.role], key)
        if stored is None:
            continue
        array = explained(checkpoint, stored)
        array = placement.layout.to_torch(row_of(array, placement.row))
        parts.setdefault(placement.param, []).append(array)
    found = {}
    for name, arrays in parts.items():
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        found[name] = np.array(joined, dtype=joined.dtype.newbyteorder("="), order="C")
    return found


def convert(checkpoint: Checkpoint, path: Path, flatten: str | None) -> list[str]:
    """Writes the Tensors to a file for `torch.load` or, by its name, safetensors; beside it first, then renamed."""
    found, notes = tensors(checkpoint, flatten)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        if path.suffix == ".safetensors":
            try:
                from safetensors.torch import save_file
            except ImportError as error:
                raise SystemExit("to write .safetensors, pip install safetensors; or write a .pt file") from error
            rate = checkpoint.hyperparameters.get("learning_rate")
            metadata = {"learning_rate": json.dumps(rate)} if isinstance(rate, dict) else None
            save_file(found, str(part), metadata=metadata)
        else:
            torch.save(found, part)
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return [f"{path}: {len(found)} tensors", *notes]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1, with the reason on stderr, if the file cannot be taken."""
    parser = argparse.ArgumentParser(prog="python -m torch_adadelta.keras", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="show weights, state, iterations and hyperparameters")
    converter = commands.add_parser("convert", help="write them as Tensors, in the layouts of PyTorch")
    droppable = [*DROPPABLE, *IDLE]
    for command in (inspect, converter):
        command.add_argument("file", type=Path, help=".h5, .keras, .weights.h5, TensorFlow checkpoint or SavedModel")
        command.add_argument("--config", type=Path, help="a file with model.to_json(), for files without it")
        command.add_argument("--drop", action="append", default=[], choices=droppable, help="what may be left out")
        command.add_argument(
            "--uses", action="append", default=[], choices=SLOT_OF, help="what it used, where the file does not say"
        )
        command.add_argument("--no-state", action="store_true", help="the weights alone, of any optimizer or none")
        command.add_argument("--state-order", nargs="+", metavar="WEIGHT", help="the weights as the optimizer has them")
    converter.add_argument("out", type=Path, help=".pt or .safetensors")
    converter.add_argument(
        "--flatten",
        choices=FLATTEN,
        help="how the model flattens feature maps; channels_last where it keeps the order of Keras",
    )
    options = parser.parse_args(arguments)
    try:
        try:
            _run(options, not options.no_state)
        except NoStateError as error:
            if options.command == "convert" or options.state_order:
                raise
            _run(options, False, str(error).removeprefix(f"{options.file}: "))
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace, has_state: bool, reason: str = "not read") -> None:
    way_out = "pass --no-state for the weights alone" if options.command == "convert" else ""
    how = (options.config, options.drop, options.state_order, options.uses, has_state, way_out)
    with opened(options.file, *how) as checkpoint:
        if options.command == "inspect":
            print(table(checkpoint, reason))
        else:
            print("\n".join(convert(checkpoint, options.out, options.flatten)))


if __name__ == "__main__":
    sys.exit(main())
