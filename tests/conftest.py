"""Puts this folder on sys.path, so that tests can import `cases` and `reference`; the paths every test runs on."""

from collections.abc import Iterator

import pytest
from cases import PATHS, Path

from torch_adadelta import ops


@pytest.fixture(params=PATHS, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Each way to compute a step: the for-loop, foreach, and the fused kernel on each instruction set."""
    chosen: Path = request.param
    if chosen.capability is None:
        yield chosen
        return
    if not ops.is_loaded:
        pytest.skip("the compiled library is not installed")
    try:
        before = ops.set_cpu_capability(chosen.capability)
    except RuntimeError:
        pytest.skip(f"this processor has no {chosen.capability}")
    yield chosen
    ops.set_cpu_capability(before)
