"""Puts this folder on sys.path, so that tests can import `cases` and `reference`; the paths every test runs on."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from cases import PATHS, Path
from processes import Processes
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torch_adadelta.backends import kernels


@pytest.fixture(params=PATHS, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Each way to compute a step: single-tensor and multi-tensor operations, and the fused kernel on each instruction set."""
    chosen: Path = request.param
    if chosen.capability is None:
        yield chosen
        return
    if not kernels.is_loaded:
        pytest.skip("the compiled library is not installed")
    try:
        before = kernels.set_cpu_capability(chosen.capability)
    except RuntimeError:
        pytest.skip(f"this processor has no {chosen.capability}")
    yield chosen
    kernels.set_cpu_capability(before)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def two() -> Iterator[Processes]:
    """Two processes of one group. They start when they are first needed, which takes seconds, and serve all tests."""
    processes = Processes(2)
    yield processes
    assert set(processes.close()) <= {0}


@pytest.fixture(scope="session")
def three() -> Iterator[Processes]:
    """Three processes, as `two`."""
    processes = Processes(3)
    yield processes
    assert set(processes.close()) <= {0}


@pytest.fixture(scope="session")
def four() -> Iterator[Processes]:
    """Four processes, as `two`."""
    processes = Processes(4)
    yield processes
    assert set(processes.close()) <= {0}


@pytest.fixture(params=["two", "three"])
def processes(request: pytest.FixtureRequest) -> Processes:
    """Two processes, and three."""
    result: Processes = request.getfixturevalue(request.param)
    return result
