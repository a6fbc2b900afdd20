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
from keras_stored import assert_same_datasets
from torch import Tensor, nn

from torch_adadelta import AdadeltaKeras
from torch_adadelta.keras import KerasFileError, freeze_second_biases, load_keras, save_keras

GENERATIONS: Final = ("tf24", "legacy", "new", "keras3")

WRITABLE: Final = ("h5", "keras", "weights.h5")

_NAMES_OF: Final = {
    "h5": "model.h5",
    "keras": "model.keras",
    "weights.h5": "model.weights.h5",
    "checkpoint": "ckpt-1.index",
    "weights_checkpoint": "weights.index",
}

# In float64: the newer classes do not round rho to float32, and divide by one root.
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


class _ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


class _GlobalAverage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def _torch_maps() -> nn.Module:
    return nn.Sequential(
        _ChannelsFirst(),
        nn.Conv2d(3, 4, (3, 2)),
        nn.ReLU(),
        nn.BatchNorm2d(4, eps=1e-3, momentum=0.1),
        nn.Sequential(nn.Conv2d(4, 4, (3, 1), padding="same", groups=4, bias=False), nn.Conv2d(4, 6, 1)),
        nn.Conv2d(6, 12, (1, 3), padding="same", groups=6),
        nn.GroupNorm(2, 12),
        nn.ConvTranspose2d(12, 5, (2, 3), stride=2),
        nn.Flatten(),
        nn.Linear(5 * 8 * 15, 5),
        nn.LayerNorm(5),
        nn.Linear(5, 1),
    )


def _torch_sequences(groups: int) -> nn.Module:
    return nn.Sequential(
        _ChannelsFirst(),
        nn.Conv1d(3, 6, 3, groups=groups),
        nn.Conv1d(6, 12, 3, groups=6, bias=False),
        nn.Conv1d(12, 4, 1),
        nn.Conv1d(4, 4, 2, groups=4),
        nn.ConvTranspose1d(4, 5, 2, stride=2),
        _GlobalAverage(),
        nn.Linear(5, 1),
    )


def _torch_volumes() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        maps = net.conv(net.up(net.enter(x).view(-1, 3, 2, 3, 2)))
        return net.out(net.norm(maps.flatten(1)))

    return _Net(
        forward,
        enter=nn.Linear(4, 36),
        up=nn.ConvTranspose3d(3, 4, (2, 3, 2), stride=2),
        conv=nn.Conv3d(4, 2, (3, 2, 1)),
        norm=nn.BatchNorm1d(2 * 2 * 6 * 4, eps=1e-3, momentum=0.1),
        out=nn.Linear(2 * 2 * 6 * 4, 1),
    )


def _torch_tokens() -> nn.Module:
    model = _Net(
        lambda net, x: net.out(net.rnn(net.embed(x))[0][:, -1]),
        embed=nn.Embedding(42, 6),
        rnn=nn.RNN(6, 4, batch_first=True),
        out=nn.Linear(4, 1),
    )
    return freeze_second_biases(model)


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
    "mixed precision": Row(_torch_chain),
    "loss scaled": Row(_torch_chain),
}


def _torch_gates() -> nn.Module:
    return _Net(
        lambda net, x: net.out(net.gru(x)[0][:, -1]),
        gru=nn.GRU(2, 2, batch_first=True),
        out=nn.Linear(2, 1),
    )


# The row of `ADDED_MODEL`.
ADDED_ROWS: Final = {"gates": Row(_torch_gates)}

# Rows of a running Keras only.
LIVE_ROWS: Final = {
    "maps": Row(_torch_maps),
    "sequences": Row(lambda: _torch_sequences(3)),
    "sequences, one group": Row(lambda: _torch_sequences(1)),
    "volumes": Row(_torch_volumes, {"flatten": "channels_first"}, {"flatten": "channels_first"}),
    "tokens": Row(_torch_tokens),
    "bfloat16": Row(_torch_chain),
}

# What an error says before it is given the configuration, the names of modules, or the order of the state.
_CONFIG: Final = r"config=model\.to_json\(\)"
_NAMES: Final = "dense may be "
_ORDER: Final = r"Pass (config=model\.to_json\(\), or )?state_order=\["

_CHAINS: Final = (
    *("chain", "frozen before", "frozen after", "renamed", "channels first", "mixed precision", "loss scaled"),
    *("maps", "sequences", "volumes", "bfloat16"),
)

STATE: Final = ("square_avg", "acc_delta", "average", "gradient_accumulator")

# What is refused at first, by generation, and what is passed then. Every other cell loads as it is.
REFUSED: Final[dict[str, dict[str, dict[str, str]]]] = {
    **{
        generation: {name: {"checkpoint": "config", "weights_checkpoint": "config"} for name in _CHAINS}
        for generation in ("tf24", "legacy")
    },
    "new": {
        **{name: {"checkpoint": "config", "weights_checkpoint": "config", "weights.h5": "config"} for name in _CHAINS},
        **{name: {"weights.h5": "config"} for name in ("branches", "nested", "shared")},
        "subclassed": {"keras": "order, mapping", "weights.h5": "order, mapping"},
        "custom layer": {"keras": "order", "weights.h5": "config, order"},
    },
    "keras3": {
        **{name: {"checkpoint": "config", "weights.h5": "config"} for name in _CHAINS},
        "nested": {"weights.h5": "config"},
        "subclassed": {"keras": "order", "weights.h5": "order"},
        "custom layer": {"checkpoint": "another file", "keras": "order", "weights.h5": "config, order"},
    },
}


def recorded(folder: Path) -> dict[str, Path]:
    """The files of a model, by their kinds."""
    return {kind: folder / name for kind, name in _NAMES_OF.items() if (folder / name).exists()}


def check(name: str, generation: str, files: dict[str, Path], truth: Any, **given: Any) -> None:
    """All kinds of files of a model, whose optimizer was given options besides those of `loaded`."""
    found = {kind: _check_cell(name, generation, kind, path, truth, given) for kind, path in files.items()}
    expected = dict.fromkeys(files, "loads") | REFUSED[generation].get(name, {})
    if "keras" in files and generation == "legacy":  # whose .keras files have no state, which is said
        expected["keras"] = "no state"
    assert found == {kind: expected[kind] for kind in files}


def _check_cell(name: str, generation: str, kind: str, path: Path, truth: Any, given: dict[str, Any]) -> str:
    way, job = loaded(name, generation, kind, path, truth, **given)
    if job is None:
        return way
    optimizer, model = job.optimizer, job.model
    is_double, is_half = truth["y"].dtype == np.float64, name in ("mixed precision", "bfloat16")
    count = len(truth["x"]) - len(truth["losses"])
    assert optimizer.param_groups[0]["iterations"] == truth.get("iterations", count)
    assert [note for note in job.notes if "the loss scale" in note] == _scale_notes(name, generation, kind)
    assert optimizer.learning_rate == 0.5
    assert {option: getattr(optimizer, option) for option in given} == given
    if kind in WRITABLE:  # nothing has changed by a bit
        back = path.with_name(f"back.{kind}")
        save_keras(back, optimizer, model, path, **job.options)
        assert_same_datasets(path, back)
    model.eval()
    with torch.no_grad():
        outputs = model(torch.from_numpy(truth["x"][0])).numpy()
    rtol, atol = (2e-2, 2e-2) if is_half else (1e-10, 1e-13) if is_double else (1e-5, 1e-6)
    np.testing.assert_allclose(outputs, truth["outputs"], rtol=rtol, atol=atol)
    for key in [
        key for key in STATE if key in truth
    ]:  # here by their numbers; that each is in its place, the losses show
        tensors = [optimizer.state[param][key].flatten() for param in model.parameters() if param.requires_grad]
        np.testing.assert_array_equal(np.sort(torch.cat(tensors).numpy()), truth[key], strict=True)
    losses = train(job, truth["x"][count:], truth["y"][count:])
    rel = 2e-2 if is_half else TOLERANCE[generation] if is_double else 1e-5
    assert losses == pytest.approx(list(truth["losses"]), rel=rel), kind
    return way


def _scale_notes(name: str, generation: str, kind: str) -> list[str]:
    """What is told of the loss scale: the one of the last step is in checkpoints, and in all files of Keras 3."""
    if name not in ("mixed precision", "loss scaled"):
        return []
    if generation == "keras3" or "checkpoint" in kind:
        value = 32768 if name == "mixed precision" else 16384  # halved by the step that was skipped
        return [f"left out: the loss scale, {value}; torch.amp.GradScaler(init_scale={value}.0) begins with it"]
    if kind == "h5" or (kind, name) == ("keras", "loss scaled"):
        return ["left out: the loss scale, which began as 32768; what became of it is not in the file"]
    return ["left out: the loss scale, which is not in the file"]


class Job(NamedTuple):
    """A model, its optimizer, and what had to be passed to load the file."""

    model: nn.Module
    optimizer: AdadeltaKeras
    options: dict[str, Any]
    notes: list[str]


def train(job: Job, xs: Any, ys: Any) -> list[float]:
    """The losses of further steps."""
    job.model.train()
    losses = []
    for x, y in zip(xs, ys, strict=True):
        job.optimizer.zero_grad()
        loss = (job.model(torch.from_numpy(x)) - torch.from_numpy(y)).square().mean()
        loss.backward()
        job.optimizer.step()
        losses.append(loss.item())
    return losses


def has_options(generation: str, kind: str) -> bool:
    """Whether files of a kind hold the configuration of the optimizer."""
    return kind == "h5" or (generation, kind) == ("new", "keras")


def loaded(
    name: str, generation: str, kind: str, path: Path, truth: Any, drop: Any = (), **given: Any
) -> tuple[str, Job | None]:
    """What had to be passed, "loads" for nothing, and the job; None if the file is refused for good."""
    name = f"{name}, one group" if (name, generation) == ("sequences", "keras3") else name
    row, is_numbered, config = (
        (ROWS | LIVE_ROWS | ADDED_ROWS)[name],
        kind in ("keras", "weights.h5"),
        str(truth["config"]),
    )
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
        model = row.torch().to(torch.from_numpy(truth["y"]).dtype)
        own = {} if has_options(generation, kind) else given
        optimizer = AdadeltaKeras(model.named_parameters(), learning_rate=0.5, rho=0.9, epsilon=1e-6, **own)
        before = [param.clone() for param in model.parameters()]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings(
                    "ignore", message=".*(not in the file|rows that a batch uses|exclude_from_weight)"
                )
                report = load_keras(path, optimizer, model, weights=True, drop=drop, **options, **extra)
        except KerasFileError as caught:
            error = str(caught)
            assert (optimizer.iterations, len(optimizer.state)) == (0, 0)
            assert all(map(torch.equal, model.parameters(), before))
        else:
            return way, Job(model, optimizer, options | extra, report.notes)
        if "holds no state of an Adadelta" in error:  # and which file to save
            return "no state", None
        if "or save a .weights.h5 file" in error:  # which is another cell
            return "another file", None
    pytest.fail(f"{generation} {kind}: no way out of: {error}")
