"""The examples on a GPU, which they take by themselves: nothing that it needs is left on the CPU."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not EXAMPLES.exists(), reason="needs the source tree"),
]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Where parameters are that optimizers step meanwhile."""
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package, reason="needs the extra 'examples'")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found: set[str] = set()

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found.update(param.device.type for group in optimizer.param_groups for param in group["params"])

    hook = register_optimizer_step_post_hook(look)
    yield found
    hook.remove()


def test_train_cuda_graph(devices: set[str]) -> None:
    runs = importlib.import_module("train_cuda_graph").main(["--epochs", "4", "--batch-size", "128"])
    one_by_one, in_a_graph = runs.values()
    # Sums in other orders aside, a replay is the step.
    assert in_a_graph.losses == pytest.approx(one_by_one.losses, rel=1e-3)
    assert in_a_graph.losses[-1] < in_a_graph.losses[0] / 2
    assert devices == {"cuda"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_train_amp(devices: set[str], dtype: str) -> None:
    runs = importlib.import_module("train_amp").main(["--epochs", "1", "--batch-size", "64", "--dtype", dtype])
    assert runs[dtype].losses == pytest.approx(runs["float32"].losses, rel=0.2)
    assert devices == {"cuda"}


def test_train_digits(devices: set[str], tmp_path: Path) -> None:
    """With another machine's convolutions the losses are those of Keras, else it exits."""
    importlib.import_module("train_digits").main(["--epochs", "2", "--output", str(tmp_path / "curves.png")])
    assert devices == {"cuda"}


def test_train_bfloat16(devices: set[str]) -> None:
    results = importlib.import_module("train_bfloat16").main(["--epochs", "1"])
    assert results["bfloat16, masters"].losses == pytest.approx(results["float32"].losses, rel=0.02)
    assert devices == {"cuda"}


def test_train_recommender(devices: set[str], tmp_path: Path) -> None:
    """With sparse gradients, and with dense ones."""
    arguments = ["--epochs", "1", "--rows", "4096", "--output", str(tmp_path / "curves.png")]
    result = importlib.import_module("train_recommender").main(arguments)
    assert result.sparse.errors[-1] < result.sparse.errors[0]
    assert devices == {"cuda"}


def test_meta_learning(devices: set[str]) -> None:
    importlib.import_module("meta_learning").main(["--steps", "2", "--tasks", "2"])
    assert devices == {"cuda"}
