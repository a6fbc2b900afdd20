"""The table of files: each kind, of each generation, of each model; and what a cell of it has to show.

A cell loads right: the outputs, both accumulators, the iterations, and the losses of three more steps. Or it is refused,
and says what to pass: then that is passed, and it loads right. `REFUSED` has those cells. In none is a file loaded
wrongly.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import KerasFileError, freeze_second_biases, load_keras

GENERATIONS: Final = ("tf24", "legacy", "new", "keras3")

# In float64, as in test_keras_files_live.py: the newer classes do not round rho to float32, and divide by one root.
TOLERANCE: Final = {"tf24": 1e-12, "legacy": 1e-12, "new": 1e-6, "keras3": 1e-6}


class Row(NamedTuple):
    torch: Callable[[], nn.Module]
    named: dict[str, Any] = {}  # noqa: RUF012  # of load_keras, for files with names
    numbered: dict[str, Any] = {}  # noqa: RUF012  # and for those without
    order: dict[str, list[str]] = {}  # noqa: RUF012  # state_order, where the error asks for it, by generation


def _torch_chain() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1))


def _frozen_chain() -> nn.Module:
    model = _torch_chain()
    model[0].requires_grad_(False)
    return model


class _Net(nn.Module):
    """Modules by name; what they compute is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _torch_branches() -> nn.Module:
    return _Net(
        lambda net, x: net.c(torch.tanh(net.a(x)) + torch.tanh(net.b(x))),
        a=nn.Linear(5, 5),
        b=nn.Linear(5, 5),
        c=nn.Linear(5, 1),
    )


def _torch_nested() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = torch.tanh(net.first(x))
        return net.out(torch.tanh(net.inner["down"](torch.tanh(net.inner["up"](x)))))

    inner = nn.ModuleDict({"down": nn.Linear(5, 5), "up": nn.Linear(5, 5)})
    return _Net(forward, inner=inner, first=nn.Linear(5, 5), out=nn.Linear(5, 1))


def _torch_shared() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.out(torch.tanh(net.shared(torch.tanh(net.between(torch.tanh(net.shared(x)))))))

    return _Net(forward, shared=nn.Linear(5, 5), between=nn.Linear(5, 5), out=nn.Linear(5, 1))


def _torch_block() -> nn.Module:
    return _Net(
        lambda net, x: net.out(torch.tanh(net.down(torch.tanh(net.up(x))))),
        down=nn.Linear(5, 5),
        up=nn.Linear(5, 5),
        out=nn.Linear(5, 1),
    )


def _torch_recurrent() -> nn.Module:
    model = _Net(
        lambda net, x: net.out(net.lstm(net.gru(x)[0])[0][:, -1]),
        gru=nn.GRU(4, 3, bidirectional=True, batch_first=True),
        lstm=nn.LSTM(6, 4, batch_first=True),
        out=nn.Linear(4, 1),
    )
    return freeze_second_biases(model)


def _torch_attention() -> nn.Module:
    return _Net(
        lambda net, x: net.out((x + net.attention(x, x, x, need_weights=False)[0]).mean(1)),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        out=nn.Linear(8, 1),
    )


def _torch_channels_first() -> nn.Module:
    layers = [
        nn.Conv2d(2, 4, 2, bias=False),
        nn.Tanh(),
        nn.BatchNorm2d(4),
        nn.AvgPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(48, 1),
    ]
    return nn.Sequential(*layers)


def _block_mapping(kernel: str, bias: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("up", "down"):
        found |= {f"block/{name}/{kernel}": (f"{name}.weight", (1, 0)), f"block/{name}/{bias}": f"{name}.bias"}
    return {"mapping": found}


# Of the layers of a subclass, the files of tf_keras and Keras 3 have some by the name of the attribute, and the others
# in the list of all layers. Only Keras 3 writes their names there.
_SUBCLASSED = {
    "new": ["up/0", "up/1", "dense/kernel", "dense/bias", "out/0", "out/1"],
    "keras3": ["up/kernel", "up/bias", "down/0", "down/1", "out/kernel", "out/bias"],
}
_BLOCK = ["block/up/0", "block/up/1", "block/down/0", "block/down/1", "out/kernel", "out/bias"]

ROWS: Final = {
    "chain": Row(_torch_chain),
    "branches": Row(_torch_branches),
    "nested": Row(_torch_nested),
    "shared": Row(_torch_shared),
    "subclassed": Row(_torch_block, order=_SUBCLASSED),
    "custom layer": Row(
        _torch_block,
        named=_block_mapping("kernel", "bias"),
        numbered=_block_mapping("0", "1"),
        order={"new": _BLOCK, "keras3": _BLOCK},
    ),
    "recurrent": Row(_torch_recurrent),
    "attention": Row(_torch_attention),
    "frozen before": Row(_frozen_chain),
    "frozen after": Row(_frozen_chain),
    "renamed": Row(_torch_chain),
    "channels first": Row(_torch_channels_first),
}

# What an error says before it is given the configuration, the names of modules, or the order of the state.
_CONFIG: Final = r"config=model\.to_json\(\)|cannot be told|does not say"
_NAMES: Final = "dense may be "
_ORDER: Final = r"Pass (config=model\.to_json\(\), or )?state_order=\["

# What is refused at first, by generation, and what is passed then. Every other cell loads as it is.
REFUSED: Final[dict[str, dict[str, dict[str, str]]]] = {
    **{
        generation: {
            name: {"checkpoint": "config", "weights_checkpoint": "config"}
            for name in ("chain", "frozen before", "frozen after", "renamed", "channels first")
        }
        for generation in ("tf24", "legacy")
    },
    "new": {
        **{
            name: {"checkpoint": "config", "weights_checkpoint": "config", "weights.h5": "config"}
            for name in ("chain", "frozen before", "frozen after", "renamed", "channels first")
        },
        **{name: {"weights.h5": "config"} for name in ("branches", "nested", "shared")},
        "subclassed": {"keras": "order, mapping", "weights.h5": "order, mapping"},
        "custom layer": {"keras": "order", "weights.h5": "config, order"},
    },
    "keras3": {
        **{
            name: {"checkpoint": "config", "weights.h5": "config"}
            for name in ("chain", "frozen before", "frozen after", "renamed", "channels first")
        },
        "nested": {"weights.h5": "config"},
        "subclassed": {"checkpoint": "another file", "keras": "order", "weights.h5": "order"},
        "custom layer": {"checkpoint": "another file", "keras": "order", "weights.h5": "config, order"},
    },
}


def check(name: str, generation: str, files: dict[str, Path], truth: Any) -> None:
    """All kinds of files of a model."""
    found = {kind: _check_cell(name, generation, kind, path, truth) for kind, path in files.items()}
    expected = dict.fromkeys(files, "loads") | REFUSED[generation].get(name, {})
    if "keras" in files and generation == "legacy":  # whose .keras files have no state, which is said
        expected["keras"] = "no state"
    assert found == {kind: expected[kind] for kind in files}


def _check_cell(name: str, generation: str, kind: str, path: Path, truth: Any) -> str:
    way, model, optimizer = _loaded(name, generation, kind, path, truth)
    if model is None or optimizer is None:
        return way
    is_double = truth["x"].dtype == np.float64
    assert optimizer.iterations == len(truth["x"]) - len(truth["losses"])
    assert optimizer.learning_rate == 0.5
    model.eval()
    with torch.no_grad():
        outputs = model(torch.from_numpy(truth["x"][0])).numpy()
    np.testing.assert_allclose(
        outputs, truth["outputs"], rtol=1e-10 if is_double else 1e-5, atol=0 if is_double else 1e-6
    )
    model.train()
    for key in ("square_avg", "acc_delta"):  # here by their numbers; that each is in its place, the losses show
        tensors = [optimizer.state[param][key].flatten() for param in model.parameters() if param.requires_grad]
        np.testing.assert_array_equal(np.sort(torch.cat(tensors).numpy()), truth[key], strict=True)
    losses = []
    for x, y in zip(truth["x"][optimizer.iterations :], truth["y"][optimizer.iterations :], strict=True):
        optimizer.zero_grad()
        loss = (model(torch.from_numpy(x)) - torch.from_numpy(y)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(list(truth["losses"]), rel=TOLERANCE[generation] if is_double else 1e-5), kind
    return way


def _loaded(
    name: str, generation: str, kind: str, path: Path, truth: Any
) -> tuple[str, nn.Module | None, AdadeltaKeras | None]:
    """What had to be passed, "loads" for nothing, and the model and its optimizer."""
    row, is_numbered, config = ROWS[name], kind in ("keras", "weights.h5"), str(truth["config"])
    options = row.numbered if is_numbered else row.named
    ways: list[tuple[str, str, dict[str, Any]]] = [("loads", "", {})]
    if config and kind not in ("h5", "keras"):
        ways.append(("config", _CONFIG, {"config": config}))
    if generation in row.order and is_numbered:
        way, _, extra = ways[-1]
        order = {**extra, "state_order": row.order[generation]}
        ways.append((f"{way}, order" if extra else "order", _ORDER, order))
        if name == "subclassed" and generation == "new":
            ways.append(("order, mapping", _NAMES, {**order, "mapping": {"dense": "down"}}))
    error = ""
    for way, message, extra in ways:
        if message and not re.search(message, error):
            continue
        torch.manual_seed(0)
        model = row.torch().to(torch.from_numpy(truth["x"]).dtype)
        optimizer = AdadeltaKeras(model.named_parameters(), learning_rate=0.5, rho=0.9, epsilon=1e-6)
        before = [param.clone() for param in model.parameters()]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", message=".*not in the file")
                load_keras(path, optimizer, model, weights=True, **options, **extra)
        except KerasFileError as caught:
            error = str(caught)
            assert (optimizer.iterations, len(optimizer.state)) == (0, 0)
            assert all(map(torch.equal, model.parameters(), before))
        else:
            return way, model, optimizer
        if "holds no state of an Adadelta" in error:  # and which file to save
            return "no state", None, None
        if "or save a .weights.h5 file" in error:  # which is another cell
            return "another file", None, None
    pytest.fail(f"{generation} {kind}: no way out of: {error}")
