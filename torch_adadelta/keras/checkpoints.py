"""Reads what a file of Keras holds: its layers with their weights, the state of its Adadelta, and the hyperparameters.

The generations of `contents` write four formats (``.h5``, ``.keras``, ``.weights.h5``, TensorFlow checkpoints), and
what they hold falls in two classes:

- In ``.h5`` and TensorFlow checkpoints, weights and state have names, and a state names its weight, or has its place
  beside it.
- In ``.keras`` and ``.weights.h5`` both are numbered, and the state in an ``.h5`` of Keras 2 is. Which weight the n-th
  state belongs to follows from the order of the layers, which is in the configuration of the model, or else from the
  shapes, if those leave one possibility.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch_adadelta.keras import config as configs
from torch_adadelta.keras.contents import NO_STATE, Checkpoint, Request, damage_named
from torch_adadelta.keras.errors import KerasFileError, NoStateError
from torch_adadelta.keras.hdf5 import Hdf5
from torch_adadelta.keras.numbered import from_numbered, from_zip
from torch_adadelta.keras.object_graph import from_object_graph
from torch_adadelta.keras.tf_checkpoint import Bundle, find_prefix
from torch_adadelta.keras.whole_model import STATE_HAS_NAMES, from_h5


@contextmanager
def opened(
    path: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    drop: Collection[str] = (),
    state_order: Sequence[str] | None = None,
    uses: Collection[str] = (),
    has_state: bool = True,
    way_out: str = "",
) -> Iterator[Checkpoint]:
    """Opens a file of any kind that holds a model of Keras and the state of its Adadelta.

    Args:
        path: an ``.h5``, ``.keras`` or ``.weights.h5`` file; or the prefix, the index or the directory of a TensorFlow
            checkpoint; or a SavedModel.
        config: the configuration of the model, for files without it, or instead of theirs: what ``model.to_json()``
            returned, a file that holds it, or the dictionary.
        drop: what may be left out, of "ema", "weight_decay" and "gradient_accumulation".
        state_order: the names of the weights in the order of the optimizer, for files that number its state.
        uses: what the optimizer used of "ema" and "gradient_accumulation", for those of these files that do not say.
        has_state: False for the weights, and the options of an Adadelta, of a file with any optimizer or none.
        way_out: what to do with a file without state, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        NoStateError: it has no state of an Adadelta.
        KerasFileError: it is none of these, or damaged.
        ValueError: `drop` has what cannot be left out, or `state_order` is given where no state is read.
        ImportError: it needs h5py, which is not installed.
    """
    if set(drop) - {*configs.DROPPABLE, *configs.IDLE}:
        raise ValueError(f"drop must be a set of {', '.join(configs.DROPPABLE)}; got {drop!r}")
    if state_order is not None and not has_state:
        raise ValueError("state_order is the order of a state, and with state=False none is read; leave it out")
    path, model = Path(path), _given_config(config)
    closers: list[Any] = []
    try:
        with damage_named(path), _with_way_out(way_out):
            checkpoint = _read(path, Request(model, drop, state_order, uses, has_state), closers)
        if checkpoint.model is not None:
            checkpoint.remarks += [
                f"its model has a lambda, {name!r}, which is not run: the PyTorch model must compute it"
                for name in checkpoint.model.lambdas
            ]
        yield checkpoint
    finally:
        for closer in closers:
            closer.close()


@contextmanager
def _with_way_out(way_out: str) -> Iterator[None]:
    try:
        yield
    except NoStateError as error:
        raise NoStateError(f"{error}; {way_out}" if way_out else str(error)) from error


def _given_config(config: Any) -> dict[str, Any] | None:
    if config is None:
        return None
    if isinstance(config, Mapping):  # with lists for tuples, as in a file
        return configs.parsed(json.dumps(dict(config), default=str), "config")
    if isinstance(config, str) and config.lstrip().startswith("{"):
        return configs.parsed(config, "config")
    if not isinstance(config, str | Path):
        raise TypeError(f"config must be a dictionary, JSON or the path of a file, got {type(config).__name__}")
    with damage_named(Path(config)):
        return configs.parsed(Path(config).read_bytes(), "config")


def _read(path: Path, request: Request, closers: list[Any]) -> Checkpoint:
    prefix = find_prefix(path)
    if prefix is not None:
        if request.state_order is not None:
            raise KerasFileError(STATE_HAS_NAMES)
        bundle = Bundle(prefix)
        closers.append(bundle)
        return from_object_graph(path, bundle, request)
    if path.is_dir():
        raise KerasFileError("the directory holds no TensorFlow checkpoint")
    with path.open("rb") as file:
        magic = file.read(8)
        size = path.stat().st_size
    if magic[:4] == b"PK\x03\x04":
        return from_zip(path, size, request, closers)
    if magic == b"\x89HDF\r\n\x1a\n":
        hdf5 = Hdf5.sandboxed(path)
        closers.append(hdf5)
        is_whole = hdf5.has("model_weights")
        if is_whole or hdf5.attribute_list("", "layer_names") is not None:
            if request.has_state and not is_whole:
                raise NoStateError(
                    NO_STATE.format(
                        why="it has weights only, as save_weights writes them in .h5", how="model.save('model.h5')"
                    )
                )
            return from_h5(path, hdf5, request)
        return from_numbered(path, hdf5, ".weights.h5", None, {}, request)
    raise KerasFileError("it is no .h5, .keras or .weights.h5 file, and there is no TensorFlow checkpoint of that name")
