"""The CUDA kernels and what launches them, compiled as C++ and run thread by thread, against the CPU kernels, bit by bit.

What an emulator cannot show: the GPU's own arithmetic (IEEE by the flags of the build), races between threads (none
shares memory with another, but for the sums in a block; the emulated order is shuffled), and speed.
"""

import mmap
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import assert_same_bits, segment
from op_cases import Lists, adadelta, assert_same_lists, several
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from torch_adadelta.backends import kernels

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "csrc" / "cuda_emulator"
COMPILER = shutil.which("g++")

# For each module of such tests: one worker compiles the library, once.
marks = [
    pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed"),
    pytest.mark.skipif(COMPILER is None, reason="no g++"),
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source tree"),
    pytest.mark.usefixtures("cuda_emulator"),
    pytest.mark.xdist_group("cuda_emulator"),
]

emulated: Any = torch.ops.torch_adadelta_emulated

CHUNK = 16384


class Tables(NamedTuple):
    """How many tensors tables of the two sizes hold, and how many segments find room beside them."""

    small: int
    large: int
    small_segments: int
    large_segments: int


# Of parameters without and with averages and remainders.
TABLES = {
    "plain": Tables(64, 600, 10, 33),
    "averages": Tables(48, 512, 15, 37),
    "remainders": Tables(48, 512, 15, 37),
    "both": Tables(40, 448, 17, 39),
}
SMALL_TABLE, LARGE_TABLE, SMALL_SEGMENTS, LARGE_SEGMENTS = TABLES["plain"]
HYPERPARAMETERS = (0.75, 0.9, 1e-6)


def build(folder: Path) -> None:
    """Compiles and loads the library."""
    path = folder / "emulated.so"
    command = [
        str(COMPILER),
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-ffp-contract=off",
        # A vector at an address that is no multiple of its size, or an index beyond an array, is an illegal instruction.
        "-fsanitize=alignment,bounds",
        "-fsanitize-undefined-trap-on-error",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *(f"-I{path}" for path in (SOURCES / "include", *include_paths())),
        str(SOURCES / "emulated_ops.cpp"),
        *(f"-L{path}" for path in library_paths()),
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        "-o",
        str(path),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    torch.ops.load_library(str(path))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "maximize": {"maximize": True},
    "clipvalue": {"clipvalue": 0.3},
    "clipnorm": {"clipnorm": 0.7, "square_sums": True},
    "clipnorm-not-reached": {"clipnorm": 1e7, "square_sums": True, "maximize": True},
    "clipvalue-clipnorm": {"clipvalue": 0.3, "clipnorm": 0.7, "square_sums": True},
    "factor": {"factor": 0.37},
    "clipvalue-factor": {"clipvalue": 0.3, "factor": 0.37, "maximize": True},
    "scale": {"grad_scale": torch.tensor(3.0)},
    "scale-clipvalue-factor": {"grad_scale": torch.tensor(0.3), "clipvalue": 0.3, "factor": 0.37},
    "loss-scale": {"loss_scale_factor": 0.7},  # which float32 does not have
    "both-scales-clipnorm": {
        "grad_scale": torch.tensor(0.3),
        "loss_scale_factor": 0.7,
        "clipvalue": 0.3,
        "clipnorm": 0.7,
        "square_sums": True,
    },
}


def options_for(dtype: torch.dtype, name: str) -> dict[str, Any]:
    return {key: value for key, value in OPTIONS[name].items() if key != "clipvalue" or not dtype.is_complex}


def _assert_same_calls(
    op: str,
    make: Callable[[], Lists],
    gradients_of: Callable[[Lists], Lists],
    seeds: Sequence[int],
    sizes: Sequence[int] | None,
    hyperparameters: tuple[Any, ...],
    maximize: bool,
    options: dict[str, Any],
    values: dict[str, Any],
) -> int:
    results = []
    launches = 0
    for namespace, seed in ((adadelta, 0), *((emulated, seed) for seed in seeds)):
        lists = make()
        if namespace is emulated:
            emulated.set_seed(seed)
        given = dict(options)
        if options.get("square_sums") is True:
            scale = {key: options[key] for key in ("grad_scale", "loss_scale_factor") if key in options}
            given["square_sums"] = adadelta.grad_square_sums(*gradients_of(lists), options.get("clipvalue"), **scale)
        for _ in range(2):
            before = emulated.launches()
            own = (
                several(sizes, maximize, **values)
                if sizes
                else segment(len(lists[0]), *hyperparameters, maximize, **values)
            )
            whole = [*lists, *[[]] * (6 - len(lists))]  # without averages or remainders
            getattr(namespace, op)(*whole, *own, **given)
            launches = emulated.launches() - before
        results.append(lists)
    for result in results[1:]:
        assert_same_lists(result, results[0])
    return launches


def assert_same_update(
    make: Callable[[], Lists],
    seeds: Sequence[int] = (1,),
    sizes: Sequence[int] | None = None,
    hyperparameters: tuple[Any, ...] = HYPERPARAMETERS,
    maximize: bool = False,
    values: dict[str, Any] | None = None,
    **options: Any,
) -> int:
    """Runs two steps on the CPU and emulated, on what `make` makes, and returns the number of launches of a step.

    A fifth list holds averages, a sixth remainders; `values` is what segments say of them. `square_sums=True` stands for
    the sums of the squares of the gradients; `sizes` are those of segments. A seed is the order in which blocks and
    threads run, 0 the plain one.
    """
    return _assert_same_calls(
        "adadelta_", make, lambda lists: lists[:2], seeds, sizes, hyperparameters, maximize, options, values or {}
    )


_DOUBLE = (torch.float64, torch.complex128)


def _values_in_opmath(lists: Lists) -> Lists:
    values = [
        x.to(torch.promote_types(x.dtype, torch.float64 if p.dtype in _DOUBLE else torch.float32))
        for x, p in zip(lists[2], lists[0], strict=True)
    ]
    return [values, values]


def assert_same_sparse_update(
    make: Callable[[], Lists],
    seeds: Sequence[int] = (1,),
    sizes: Sequence[int] | None = None,
    hyperparameters: tuple[Any, ...] = HYPERPARAMETERS,
    maximize: bool = False,
    values: dict[str, Any] | None = None,
    **options: Any,
) -> int:
    """As `assert_same_update`, for sparse gradients; the sixth list holds remainders."""
    return _assert_same_calls(
        "sparse_adadelta_", make, _values_in_opmath, seeds, sizes, hyperparameters, maximize, options, values or {}
    )


SQUARE_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipvalue": {"clipvalue": 0.3},
    "in-double": {"in_double": True},
    "scale": {"grad_scale": torch.tensor(0.3), "clipvalue": 2.0},
    "both-scales": {"grad_scale": torch.tensor(0.3), "loss_scale_factor": 0.7},
}


def assert_same_square_sums(
    params: list[Tensor], grads: list[Tensor], seeds: Sequence[int] = (1,), **options: Any
) -> int:
    expected = adadelta.grad_square_sums(params, grads, **options)
    launches = 0
    for seed in seeds:
        emulated.set_seed(seed)
        before = emulated.launches()
        assert_same_bits(emulated.grad_square_sums(params, grads, **options), expected)
        launches = emulated.launches() - before
    return launches


def virtual_zeros(count: int, dtype: torch.dtype) -> Tensor:
    """Memory of which no more exists than is written to."""
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python 3.12 has no name for
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    except (OSError, OverflowError, ValueError):
        pytest.skip(f"needs {count * dtype.itemsize / 2**30:.0f} GiB of addresses")
    return torch.frombuffer(memory, dtype=dtype)
