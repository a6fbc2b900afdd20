"""csrc/cuda/device.h on a fake GPU: launches and their failures, and a machine without the CUDA library.

A fake GPU: CUDA tensors in the memory of the host, the kernels emulated. See tests/csrc/cuda_emulator.
"""

import re
import subprocess
from collections.abc import Callable

import pytest
import torch
from emulated import COMPILER, ROOT, SOURCES

from torch_adadelta.backends import kernels

Run = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = [
    pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA, which needs no fake"),
    pytest.mark.skipif(COMPILER is None, reason="no g++"),
    pytest.mark.skipif(not SOURCES.exists(), reason="needs the source tree"),
    pytest.mark.xdist_group("fake_gpu"),
]


def test_launches_and_their_failures(run_with_fake_gpu: Run) -> None:
    tests = str(SOURCES / "only_fake.py")
    result = run_with_fake_gpu(
        "-m", "pytest", "-p", "fake_cuda", "-p", "no:cacheprovider", "-q", "--rootdir", str(ROOT), tests
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d\d passed", result.stdout), result.stdout


WITHOUT_LIBRARY = """
import fake_cuda
import warnings
import torch
from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels

def params():
    params = [torch.nn.Parameter(torch.zeros(2, device=device)) for device in ("cuda", "cpu")]
    for param in params:
        param.grad = torch.ones_like(param)
    return params

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        both = params()
        optimizer = AdadeltaKeras(both, 1.0)
        optimizer.step()
        optimizer.step()
assert torch.equal(both[0].cpu(), both[1]) and both[0].is_cuda
for warning in caught:
    print(f"{warning.category.__name__}: {warning.message}")
try:
    AdadeltaKeras(params()[:1], fused=True)
except RuntimeError as error:
    print(error)
"""


def test_without_the_cuda_library_the_python_paths_run(run_with_fake_gpu: Run) -> None:
    """A PyTorch with CUDA, but no nvcc when the package was installed: one warning, which says what to install."""
    result = run_with_fake_gpu("-c", WITHOUT_LIBRARY, WITHOUT_CUDA_LIBRARY="1")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stdout
    why = (
        r"/\S+/_C_cuda.so does not exist: torch_adadelta was installed where no CUDA compiler \(nvcc\) was found, or "
        r"with TORCH_ADADELTA_CUDA=0. Install the CUDA toolkit .+ and run `pip install --no-build-isolation .` again."
    )
    assert re.fullmatch(
        f"RuntimeWarning: torch_adadelta runs without its CUDA library, many times slower: {why}", lines[0]
    )
    assert re.fullmatch(f"`fused=True` cannot run on cuda parameters: {why}; leave `fused` None", lines[1])


@pytest.mark.parametrize("has_library", [True, False])
def test_diagnostics(run_with_fake_gpu: Run, has_library: bool) -> None:
    program = "import fake_cuda, runpy; runpy.run_module('torch_adadelta', run_name='__main__')"
    result = run_with_fake_gpu("-c", program, **({} if has_library else {"WITHOUT_CUDA_LIBRARY": "1"}))
    assert result.returncode == 0, result.stdout + result.stderr
    before, _, on_cuda = result.stdout.partition("One step of each path on cuda")
    assert "GPU 1          fake GPU (sm_00)" in before
    assert on_cuda.count("ok, same bits as single_tensor on the CPU") == (3 if has_library else 2), result.stdout
    if not has_library:
        assert re.search(r"CUDA library   not loaded: FileNotFoundError: .*Install the CUDA toolkit", before)
        assert "fused          cannot run: its library is not loaded" in on_cuda
