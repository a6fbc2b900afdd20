"""The tests for a GPU in tests/cuda, on a fake one.

What runs for real: the optimizer with tensors that PyTorch takes for CUDA's, csrc/cuda/device.h, the launches, and
what a step asks of the device. What does not: the GPU's arithmetic and memory, time, streams, the driver, and how
CUDA captures a graph. See tests/csrc/cuda_emulator.
"""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import test_cuda_device
from emulated import ROOT, SOURCES

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = test_cuda_device.pytestmark


def run_tests(run: Run, *tests: str, **environment: str) -> int:
    """Runs them with the fake GPU, and returns how many passed."""
    arguments = ["-m", "pytest", "-p", "fake_cuda", "-p", "no:cacheprovider", "-q", "--rootdir", str(ROOT)]
    result = run(*arguments, *tests, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, result.stdout
    return int(passed[1])


def test_a_sample(run_with_fake_gpu: Run) -> None:
    """What only tests on a device can show of the optimizer: graphs, scales, hyperparameters and counts there."""
    tests = [str(ROOT / "tests" / "cuda" / f"test_gpu_{name}.py") for name in ("amp", "graphs", "optimizer")]
    assert run_tests(run_with_fake_gpu, *tests, FAKE_CUDA_SAMPLE="7") > 40


@pytest.mark.slow
def test_all(run_with_fake_gpu: Run) -> None:
    assert run_tests(run_with_fake_gpu, str(ROOT / "tests" / "cuda")) > 800


@pytest.mark.slow
def test_the_state_machine_with_moves_between_devices(run_with_fake_gpu: Run) -> None:
    assert run_tests(run_with_fake_gpu, str(SOURCES / "moving_state_machine.py")) == 1


BENCHMARK = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import fake_cuda, bench, torch, workloads
from workloads import Workload, many, one

if __name__ == "__main__":
    small = [
        Workload("1x64M", one(1000), clips=True, fits_cache=False),
        Workload("1x64M-bfloat16", one(1000), torch.bfloat16, clips=True, fits_cache=False),
        Workload("1000x16", many(10, 16), fits_cache=False),
    ]
    workloads.of_cuda, bench.MOST_CUDA_CALLS = lambda quick: small, 2  # what takes long here
    options = "--device cuda --part steps --rounds 2 --runs 2 --threads 1 --output"
    bench.main([*options.split(), sys.argv[1]])
"""


@pytest.mark.slow
def test_the_benchmark(run_with_fake_gpu: Run, tmp_path: Path) -> None:
    """`benchmarks/bench.py --device cuda`, where every turn takes a millisecond."""
    (tmp_path / "fake_bench.py").write_text(BENCHMARK)
    result = run_with_fake_gpu(str(tmp_path / "fake_bench.py"), str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["machine"]["GPU"].startswith("fake GPU")
    float32, bfloat16, small = data["records"]
    for record, others in ((float32, {"a device copy"}), (bfloat16, {"AdadeltaKeras, fused, float32"}), (small, set())):
        assert len(record["runs"]) == 2
        for run in record["runs"]:
            ours = {"AdadeltaKeras, fused", "AdadeltaKeras, fused, graph replay", "torch.optim.Adam, fused"}
            assert run["seconds"].keys() >= ours | others, run["absent"]
            assert all(len(by["step"]) == len(by["host"]) == 2 for by in run["seconds"].values())
            assert run["memory"]["AdadeltaKeras, fused"] == run["abnormal"] == 0
    results = {(target["workload"], target["what"]): target["result"] for target in data["targets"]}
    assert results["1x64M", "bytes a second against those of a device copy"] == "pass"
    assert results["1000x16", "a graph replay"] == "fail"  # half a millisecond
    assert results["1x64M-bfloat16", "extra memory: AdadeltaKeras, fused, clipnorm"] == "pass"
