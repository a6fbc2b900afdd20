"""csrc/cpu/dispatch.cpp: the instruction set, the best that there is or a chosen one."""

import os
import subprocess
import sys

import pytest
import torch
from op_cases import capabilities, needs_library

from torch_adadelta.backends import kernels

pytestmark = needs_library


def test_in_process() -> None:
    best = kernels.cpu_capability()
    for name in capabilities():
        assert kernels.set_cpu_capability(name) == best
        assert kernels.cpu_capability() == name
        assert kernels.set_cpu_capability(best) == name
    for number in (-1, kernels.CPU_CAPABILITIES.index(best) + 1, len(kernels.CPU_CAPABILITIES)):
        with pytest.raises(RuntimeError, match=f"this processor has the CPU capabilities 0 to [0-3], got {number}"):
            torch.ops.torch_adadelta.set_cpu_capability(number)
        assert kernels.cpu_capability() == best
    with pytest.raises(ValueError):
        kernels.set_cpu_capability("SSE9")


def test_by_the_environment() -> None:
    def started_with(capability: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from torch_adadelta.backends import kernels as k; print(k.cpu_capability())"]
        environment = {**os.environ, "TORCH_ADADELTA_CPU_CAPABILITY": capability}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    assert started_with("DEFAULT").stdout.strip() == "default"
    ignored = started_with("sse9")
    assert ignored.stdout.strip() == kernels.cpu_capability()
    assert "TORCH_ADADELTA_CPU_CAPABILITY=sse9 is ignored" in ignored.stderr


def test_the_best_is_what_the_processor_has() -> None:
    """As Linux lists it."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next(set(line.split()) for line in file if line.startswith("flags"))
    except (OSError, StopIteration):
        pytest.skip("no /proc/cpuinfo with flags of x86")
    has_avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    expected = (
        ("AVX512_BF16" if "avx512_bf16" in flags else "AVX512")
        if has_avx512
        else "AVX2"
        if "avx2" in flags
        else "default"
    )
    assert kernels.cpu_capability() == expected
