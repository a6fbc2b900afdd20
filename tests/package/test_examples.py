"""The examples, run as a newcomer runs them, with little data; and the code of the README."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python examples/x.py` does, which lets an example import what stands beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("float64", 1e-13)])
def test_train_digits_has_the_losses_of_keras_and_draws_them(
    dtype: str, most: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = runpy.run_path(str(ROOT / "examples" / "train_digits.py"))
    picture = tmp_path / "curves.png"
    result = module["main"](["--epochs", "4", "--device", "cpu", "--dtype", dtype, "--output", str(picture)])
    assert "A step of AdadeltaKeras is " in capsys.readouterr().out
    assert len(result.keras.losses) == 4 * result.batches_per_epoch
    assert result.keras.losses[-1] < result.keras.losses[0] / 5
    for run in result.ours.values():
        assert len(run.losses) == len(result.keras.losses)
        assert max(module["distances"](run, result)) < 1e-5
        assert run.accuracy > 0.9
    assert max(module["distances"](result.ours["AdadeltaKeras"], result)) < most
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_train_digits_fails_where_the_losses_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import train_digits

    arguments = ["--epochs", "1", "--device", "cpu", "--output", str(tmp_path / "curves.png")]
    with monkeypatch.context() as changed:
        changed.setattr(train_digits, "RHO", 0.9)
        with pytest.raises(SystemExit, match=r"The losses of AdadeltaKeras are .* from those of Keras, above 1e-04"):
            train_digits.main(arguments)
    monkeypatch.setattr(train_digits, "SEED", 1)
    with pytest.raises(SystemExit, match="was recorded with other images, weights or batches"):
        train_digits.main(arguments)


def test_train_recommender_learns_and_draws(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "train_recommender.py"))["main"]
    picture = tmp_path / "curves.png"
    result = main(["--rows", "4096", "--epochs", "3", "--output", str(picture)])
    for run in (result.sparse, result.dense):
        assert len(run.errors) == len(run.seconds) == 4
        assert run.errors[-1] < result.error_of_means < run.errors[0]
    assert result.sparse.errors[0] == result.dense.errors[0]
    assert result.sparse.errors[-1] != result.dense.errors[-1]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_resume_from_keras_goes_on_as_keras(tmp_path: Path) -> None:
    pytest.importorskip("keras", reason="needs the extra 'parity'")
    pytest.importorskip("tensorflow", reason="needs the extra 'parity'")
    module = runpy.run_path(str(ROOT / "examples" / "resume_from_keras.py"))
    picture = tmp_path / "curve.png"
    result = module["main"](["--epochs", "4", "--plot", str(picture)])
    assert len(result.before) == 2 * result.batches_per_epoch
    assert len(result.after["PyTorch"]) == 2 * result.batches_per_epoch
    assert module["distance"](result, "PyTorch") < module["TOLERANCE"]
    # What the state is worth: without it the same weights train differently.
    assert module["distance"](result, "PyTorch, weights only") > 100 * module["TOLERANCE"]
    assert result.after["PyTorch"][-1] < result.before[0] / 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_port_from_keras_keeps_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="needs the extra 'parity'")
    pytest.importorskip("tf_keras", reason="needs the extra 'parity'")
    main = runpy.run_path(str(ROOT / "examples" / "port_from_keras.py"))["main"]
    picture = tmp_path / "curves.png"
    result = main(["--epochs", "2", "--plot", str(picture)])
    # Measured, for three seeds and up to 8 epochs: at most 9 rounding units (losses, parameters, accum_grad) and 17
    # (accum_var, where TensorFlow's approximate square roots add up). The rest is room for another machine's matrix
    # products. A rho that is not rounded to float32, the smallest mistake there is, is 10**9 units off in float64.
    for dtype, unit in (("float32", 2.0**-24), ("float64", 2.0**-53)):
        comparison = result.by_dtype[dtype]
        assert len(comparison.losses) == 2 * result.batches_per_epoch
        assert comparison.keras.losses[-1] < 0.7 * comparison.keras.losses[0]
        assert max(comparison.losses) < 40 * unit
        assert comparison.weights < 40 * unit
        assert comparison.accum_grad < 40 * unit
        assert comparison.accum_var < 128 * unit
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_train_bfloat16_prints_the_losses_of_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "train_bfloat16.py"))["main"]
    results = main(["--epochs", "3"])
    printed = capsys.readouterr().out
    for name, result in results.items():
        assert len(result.losses) == 4
        assert result.losses[-1] < result.losses[0]
        assert f"{result.losses[-1]:.4f}" in next(line for line in printed.splitlines() if f" {name} " in line)
    # It starts from the same weights, and has lost much of what float32 gained.
    start, *_, end = results["float32"].losses
    assert results["bfloat16"].losses[0] == pytest.approx(start, rel=1e-3)
    assert results["bfloat16"].losses[-1] - end > 0.2 * (start - end)
    assert results["bfloat16, masters"].losses[-1] - end < 0.02 * (start - end)


def test_train_cuda_graph_says_where_it_runs_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "train_cuda_graph.py"))["main"]
    runs = main(["--device", "cpu", "--epochs", "4", "--batch-size", "128"])
    assert list(runs) == ["one by one"]
    assert "no CUDA graphs on the CPU" in capsys.readouterr().out
    assert len(runs["one by one"].losses) == 4 * (1347 // 128)
    assert runs["one by one"].losses[-1] < runs["one by one"].losses[0] / 2


def test_train_amp_follows_float32_and_skips_what_is_not_finite() -> None:
    main = runpy.run_path(str(ROOT / "examples" / "train_amp.py"))["main"]
    runs = main(["--device", "cpu", "--epochs", "2"])
    assert runs["float32"].skipped == runs["bfloat16"].skipped == 0
    assert runs["bfloat16"].losses != runs["float32"].losses
    assert runs["bfloat16"].losses == pytest.approx(runs["float32"].losses, rel=0.1)
    # With this scale gradients overflow: each such step is skipped, and halves it.
    runs = main(["--device", "cpu", "--epochs", "1", "--batch-size", "64", "--dtype", "float16", "--scale", "1e9"])
    assert runs["float32"].skipped == 0
    assert 0 < runs["float16"].skipped < 22


# Short runs on the CPU, and the dtypes of the parameters that their optimizers step. test_keras3_models.py runs that of Keras 3.
IN_FLOAT64 = {
    "meta_learning": (["--steps", "2", "--tasks", "2"], {"torch.float64"}),
    "port_from_keras": (["--epochs", "1"], {"torch.float64"}),
    "resume_from_keras": (["--epochs", "2"], {"torch.float64"}),
    "train_bfloat16": (["--epochs", "1"], {"torch.float64", "torch.bfloat16"}),
    "train_cuda_graph": (["--epochs", "4", "--batch-size", "256"], {"torch.float64"}),
    "train_recommender": (["--epochs", "1", "--rows", "1024"], {"torch.float64"}),
}


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_examples_train_in_the_dtype_that_is_asked_for(name: str, tmp_path: Path) -> None:
    """In a process of its own, which keeps Keras' floatx."""
    if name.endswith("_from_keras"):
        pytest.importorskip("tf_keras", reason="needs the extra 'parity'")
    arguments, dtypes = IN_FLOAT64[name]
    program = f"""
from torch.optim.optimizer import register_optimizer_step_post_hook
seen = set()
register_optimizer_step_post_hook(lambda o, *_: seen.update(str(p.dtype) for g in o.param_groups for p in g["params"]))
import {name}
{name}.main({[*arguments, "--device", "cpu", "--dtype", "float64"]})
assert seen == {dtypes}, seen
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "examples")))}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train_digits", ["--dtype", "bfloat16"], "--dtype: bfloat16: Keras was recorded .* Use float32 or float64$"),
        ("train_digits", ["--epochs", "21"], "--epochs: must be at most 20, which are recorded, got 21$"),
        ("train_bfloat16", ["--dtype", "float16"], "--dtype: float16: .* Use float32 or float64$"),
        ("train_amp", ["--dtype", "float64"], "--dtype: float64: .* Use bfloat16 or float16$"),
        ("train_recommender", ["--dtype", "float16"], "--dtype: float16: .* Use float32 or float64 or bfloat16$"),
        ("meta_learning", ["--dtype", "bfloat16"], "--dtype: bfloat16: .* Use float32 or float64$"),
        ("train_cuda_graph", ["--dtype", "int8"], "--dtype: int8: not a dtype of a model. Use float32 or .*float16$"),
        ("train_cuda_graph", ["--device", "cuda:99"], "--device: cuda:99: PyTorch finds \\d+ CUDA devices here. Use "),
        ("train_cuda_graph", ["--device", "mps"], "--device: mps: .* Use cpu or cuda$"),
        ("train_cuda_graph", ["--device", "gpu"], "--device: gpu: .* Use cpu, cuda or cuda:N$"),
    ],
)
def test_what_an_example_cannot_do_is_refused(
    name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err.strip())


def test_meta_learning_learns() -> None:
    main = runpy.run_path(str(ROOT / "examples" / "meta_learning.py"))["main"]
    before, after = main(["--steps", "30", "--tasks", "2"])
    assert after < 0.8 * before


def test_readme_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    pytest.importorskip("h5py", reason="needs the extra 'keras'")
    monkeypatch.chdir(ROOT)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["optimizer"].learning_rate == 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["torch_adadelta.optimizer", "torch_adadelta.keras.transfer"])
def test_docstring_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import doctest
    import importlib

    import torch

    pytest.importorskip("h5py", reason="needs the extra 'keras'")
    monkeypatch.chdir(ROOT)
    results = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0
