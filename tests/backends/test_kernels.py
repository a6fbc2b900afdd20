"""The compiled libraries as the package sees them: loading, arguments, refusals, fakes, and cached accumulators."""

import gc
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, REAL_DTYPES, assert_same_bits, coo, dtype_name, gradients, randn
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_adadelta.backends import functional, kernels
from torch_adadelta.backends.batch import NO_OPTIONS, Backend, Batch, GradientOptions, Refusal, Segment

needs_library = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")


# ---- Loading --------------------------------------------------------------------------------------------------------


def kernels_beside(folder: Path, library: bytes | None) -> Any:
    """The module as it is where this, or nothing, is the library."""
    (folder / "backends").mkdir()
    source = shutil.copy(kernels.__file__, folder / "backends" / "kernels.py")
    if library is not None:
        (folder / "_C.so").write_bytes(library)
    spec = importlib.util.spec_from_file_location("kernels_elsewhere", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", [None, "13.0"])
def test_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    module = kernels_beside(tmp_path, None)
    assert not module.is_loaded
    assert not module.is_cuda_loaded
    assert not module.has_kernel_for(torch.ones(1))
    assert not module.has_kernel_for(torch.ones(1, device="meta"))
    assert isinstance(module.load_error, FileNotFoundError)
    why = (
        f"{tmp_path}/_C.so does not exist: torch_adadelta was installed where no C++ compiler was found, or with "
        "TORCH_ADADELTA_NO_EXT=1. Install a C++ compiler and run `pip install --no-build-isolation .` again."
    )
    assert module.why_no_kernel("cpu") == why
    assert module.why_no_kernel("cuda") == ("this PyTorch was built without CUDA" if version is None else why)
    assert module.why_no_kernel("xpu") == "there are kernels for cpu and cuda parameters, not for xpu"
    text = f"torch_adadelta runs without its compiled library, many times slower: {why}"
    with pytest.warns(RuntimeWarning, match=re.escape(text)):
        module.warn_not_loaded("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.warn_not_loaded("cpu")  # once in a process
        with pytest.raises(RuntimeWarning, match="runs without its CUDA library"):
            module.warn_not_loaded("cuda")


def test_a_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    module = kernels_beside(tmp_path, b"no library")
    assert not module.is_loaded
    assert isinstance(module.load_error, OSError)  # what the linker said, not what PyTorch made of it
    assert "_C.so: file too short" in module.why_no_kernel("cpu")


@needs_library
def test_with_the_library() -> None:
    assert kernels.load_error is None
    assert kernels.has_kernel_for(torch.ones(1))
    assert not kernels.has_kernel_for(torch.ones(1, device="meta"))
    assert kernels.is_cuda_loaded == (kernels.cuda_load_error is None)


@needs_library
@pytest.mark.skipif(kernels.CUDA_LIBRARY_PATH.exists(), reason="the CUDA library is installed")
def test_without_the_cuda_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert str(kernels._load_cuda()) == (
        f"{kernels.CUDA_LIBRARY_PATH} does not exist: torch_adadelta was installed where no CUDA compiler (nvcc) was "
        "found, or with TORCH_ADADELTA_CUDA=0. Install the CUDA toolkit 13.0 and run `pip install --no-build-isolation "
        ".` again."
    )


def test_both_libraries_have_kernels_for_cpu_and_cuda() -> None:
    with FakeTensorMode():
        devices = {kind: torch.empty(1, device=kind) for kind in ("cpu", "cuda", "meta")}
    assert [kernels._has_kernel(x) for x in devices.values()] == [True, True, False]


@needs_library
def test_the_instruction_set_can_be_chosen() -> None:
    best = kernels.cpu_capability()
    assert kernels.set_cpu_capability("default") == best
    try:
        assert kernels.cpu_capability() == "default"
        with pytest.raises(ValueError):
            kernels.set_cpu_capability("SSE9")
    finally:
        assert kernels.set_cpu_capability(best) == "default"


@needs_library
def test_the_instruction_set_can_be_chosen_by_the_environment() -> None:
    program = "from torch_adadelta.backends import kernels; print(kernels.cpu_capability())"
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "TORCH_ADADELTA_CPU_CAPABILITY": name},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("Default", "sse9")
    }
    said = {name: process.communicate(timeout=120) for name, process in started.items()}
    assert said["Default"][0].strip() == "default"
    assert "is ignored" not in said["Default"][1]
    assert said["sse9"][0].strip() == kernels.cpu_capability()
    assert "TORCH_ADADELTA_CPU_CAPABILITY=sse9 is ignored: it is none of default, AVX2, AVX512" in said["sse9"][1]


# ---- Arguments ------------------------------------------------------------------------------------------------------


def test_hyperparameters_of_segments() -> None:
    lr = torch.tensor(0.5)
    assert kernels.hyperparameter_arguments([]) == ([], [], [])
    segments = [Segment(3, 1, 0.9, 1e-7, True, 0.1, False, 0.75, True, 2, True), Segment(0, 0.25, 0.5, 1e-3, False)]
    sizes, numbers, tensors = kernels.hyperparameter_arguments(segments)
    expected = [1.0, 0.9, 1e-7, 1.0, 0.1, 0.0, 0.75, 1.0, 2.0, 1.0, 0.25, 0.5, 1e-3, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert (sizes, numbers, tensors) == ([3, 0], expected, [])
    assert set(map(type, numbers)) == {float}
    sizes, numbers, tensors = kernels.hyperparameter_arguments([*segments, Segment(2, lr, 0.75, 1.0, True)])
    assert (sizes, numbers[20:]) == ([3, 0, 2], [0.0, 0.75, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert [x is lr for x in tensors] == [False] * 20 + [True] + [False] * 9
    assert tensors.count(None) == 29


def test_options_of_gradients() -> None:
    assert kernels.option_arguments(NO_OPTIONS) == (None, None, None, 1.0, None, None, 1.0, None)
    sums, scale, found_inf, factor = (torch.tensor(float(i)) for i in range(4))
    options = GradientOptions(0.5, 0.25, sums, 0.75, scale, found_inf, 3.0)
    assert kernels.option_arguments(options) == (0.5, 0.25, sums, 0.75, None, scale, 3.0, found_inf)
    options = GradientOptions(factor=factor)
    assert kernels.option_arguments(options) == (None, None, None, 0.0, factor, None, 1.0, None)


SUMS = torch.tensor([4.0, 0.25, 9.0, 1.0], dtype=torch.float64)

# The options, and what the gradients are divided by first.
OPTIONS: dict[str, tuple[dict[str, Any], float]] = {
    "none": ({}, 1.0),
    "clipvalue": ({"clipvalue": 0.1}, 1.0),
    "clipnorm": ({"clipnorm": 0.3, "square_sums": SUMS}, 1.0),
    "factor": ({"factor": 0.3}, 1.0),
    "factor in a Tensor": ({"factor": torch.tensor(0.3, dtype=torch.float64)}, 1.0),
    "scaled": ({"clipvalue": 0.1, "grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0)}, 4.0),
    "skipped": ({"found_inf": torch.tensor(1.0)}, 0.0),
    "factor of the loss": ({"clipvalue": 0.1, "loss_scale_factor": 8.0, "grad_scale": torch.tensor(4.0)}, 32.0),
    "factor of the loss alone": ({"loss_scale_factor": 8.0}, 8.0),
}


def make_batch(is_sparse: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Batch:
    """Four parameters in two segments, one of which has a Tensor."""
    generator = torch.Generator().manual_seed(0)
    params = [randn((6, 5), dtype, generator) for _ in range(4)]
    grads = [gradients((6, 5), dtype, 1, seed=i)[0] for i in range(4)]
    if is_sparse:
        grads = [coo([0, 5, 3, 5, 1, 0], grad, (6, 5)) for grad in grads]
    states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    segments = [Segment(3, 1.0, 0.9375, 1e-6, False), Segment(1, torch.tensor(0.5), 0.75, 1e-3, True)]
    given = GradientOptions(**options) if options else NO_OPTIONS
    return Batch(Backend.FUSED, is_sparse, False, params, grads, *states, segments, given)


def written(batch: Batch) -> list[Tensor]:
    return [x for tensors in (batch.params, batch.square_avgs, batch.acc_deltas) for x in tensors]


def cache_of(batch: Batch) -> Any:
    cache = kernels.cached_accumulators(batch.square_avgs, batch.acc_deltas)
    assert cache is not None
    batch.accumulators = cache.number
    return cache


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("kind", ["dense", "cached", "sparse"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_fused_update_is_that_of_functional(name: str, kind: str, dtype: torch.dtype) -> None:
    options, scale = OPTIONS[name]
    batch, expected = (make_batch(kind == "sparse", dtype, **options) for _ in range(2))
    cache = cache_of(batch) if kind == "cached" else None
    expected.grads = [grad.to(functional.opmath_dtype(dtype)) / (scale or 1.0) for grad in expected.grads]
    expected.gradient_options = expected.gradient_options._replace(loss_scale_factor=1.0)
    versions = [p._version for p in batch.params]
    assert kernels.update(batch) is None
    assert batch.has_begun
    assert all(p._version > version for p, version in zip(batch.params, versions, strict=True))
    if scale > 0:
        (functional.sparse_single_tensor if kind == "sparse" else functional.single_tensor)(expected)
    for i, (actual, wanted) in enumerate(zip(written(batch), written(expected), strict=True)):
        assert_same_bits(actual, wanted, str(i))
    del cache


@needs_library
@pytest.mark.parametrize("is_sparse", [False, True])
def test_masters_are_those_of_functional(is_sparse: bool) -> None:
    batch, expected = (make_batch(is_sparse, torch.bfloat16) for _ in range(2))
    for one in (batch, expected):
        one.segments = [segment._replace(has_masters=True) for segment in one.segments]
        one.remainders = [torch.full((6, 5), 100 * i, dtype=torch.int16) for i in range(4)]
    assert not is_sparse or kernels.first_invalid_indices(batch).tolist() == [-1] * 4  # type: ignore[union-attr]
    assert kernels.update(batch) is None
    (functional.sparse_single_tensor if is_sparse else functional.single_tensor)(expected)
    for actual, wanted in zip(
        (*written(batch), *batch.remainders), (*written(expected), *expected.remainders), strict=True
    ):
        assert torch.equal(actual, wanted)


@needs_library
def test_averages_are_for_the_op_that_is_not_cached() -> None:
    """Though the accumulators are cached."""
    batch, expected = make_batch(), make_batch()
    cache = cache_of(batch)
    for one in (batch, expected):
        one.segments = [segment._replace(ema_momentum=0.75, overwrites=True) for segment in one.segments]
    kernels.update(batch)  # without averages, what segments say of them means nothing
    functional.single_tensor(expected)
    assert all(map(torch.equal, written(batch), written(expected)))
    for one in (batch, expected):
        one.averages = [torch.ones(6, 5) for _ in range(4)]
    kernels.update(batch)
    functional.single_tensor(expected)
    assert all(map(torch.equal, (*written(batch), *batch.averages), (*written(expected), *expected.averages)))
    assert not torch.equal(batch.averages[0], torch.ones(6, 5))
    del cache


@needs_library
def test_an_update_by_sparse_gradients_leaves_averages_alone() -> None:
    batch, expected = (make_batch(is_sparse=True) for _ in range(2))
    for one in (batch, expected):
        one.segments = [segment._replace(ema_momentum=0.75, overwrites=True) for segment in one.segments]
        one.averages = [torch.ones(6, 5) for _ in range(4)]
    assert kernels.update(batch) is None
    functional.sparse_single_tensor(expected)
    assert all(map(torch.equal, written(batch), written(expected)))
    assert all(torch.equal(x, torch.ones(6, 5)) for x in (*batch.averages, *expected.averages))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_square_sums_are_those_of_functional(dtype: torch.dtype) -> None:
    params = [torch.empty(n, dtype=dtype) for n in (5, 0, 4099)]
    for grad_dtype in REAL_DTYPES if not dtype.is_complex else (dtype,):
        grads = [gradients((p.numel(),), grad_dtype, 1, seed=i)[0] for i, p in enumerate(params)]
        for clipvalue in (None, 0.3) if not dtype.is_complex else (None,):
            for in_double in (False, True):
                for scale, factor in ((None, 1.0), (4.0, 1.0), (None, 7.0), (4.0, 7.0)):
                    tensor = None if scale is None else torch.tensor(scale)
                    actual = kernels.square_sums(params, grads, clipvalue, in_double, tensor, factor)
                    T = torch.float64 if in_double else functional.opmath_dtype(dtype)
                    T = T.to_complex() if dtype.is_complex else T
                    divided = [grad.to(T) / (scale or 1.0) for grad in grads]
                    expected = functional.square_sums(params, divided, clipvalue, in_double, factor)
                    assert isinstance(actual, Tensor)
                    assert_same_bits(actual, expected)


@needs_library
def test_nothing_to_update() -> None:
    assert kernels.update(Batch(Backend.FUSED, False, False, [], [], [], [], [])) is None
    assert kernels.update(Batch(Backend.FUSED, True, False, [], [], [], [], [])) is None
    nothing = kernels.square_sums([], [])
    assert isinstance(nothing, Tensor)
    assert (nothing.shape, nothing.dtype) == ((0,), torch.float64)


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torch_adadelta refuses parameter 12: it has\ntwo lines", Refusal("it has\ntwo lines", 12)),
        ("In a stack: torch_adadelta refuses parameter 0: why", Refusal("why", 0)),
        ("torch_adadelta refuses the call: why", Refusal("why", None)),
        ("Could not run 'torch_adadelta::x'\nwith", Refusal("Could not run 'torch_adadelta::x'", None)),
        ("fallback doesn't currently support mutable TensorLists.\nMore", Refusal("fallback doesn't currently support mutable TensorLists.", None)),
    ],
)  # fmt: skip
def test_what_an_op_said(text: str, expected: Refusal) -> None:
    assert kernels._refusal(RuntimeError(text)) == expected


def test_what_else_is_raised_is_raised_again() -> None:
    error = RuntimeError("Could not run 'aten::x'")
    with pytest.raises(RuntimeError) as caught:
        kernels._refusal(error)
    assert caught.value is error


def _wrong_shape(batch: Batch) -> None:
    batch.grads[2] = torch.ones(6, 4)


def _wrong_state(batch: Batch) -> None:
    batch.acc_deltas[2] = batch.acc_deltas[2].double()


def _too_few(batch: Batch) -> None:
    batch.square_avgs.pop()


def _on_meta(batch: Batch) -> None:
    batch.square_avgs[2] = torch.ones(6, 5, device="meta")


def _wrong_option(batch: Batch) -> None:
    batch.gradient_options = GradientOptions(clipvalue=-1.0)


@needs_library
@pytest.mark.parametrize(
    ("corrupt", "param", "message"),
    [
        (_wrong_shape, 2, "its tensors differ in shape"),
        (_wrong_state, 2, "its state has another dtype than the parameter"),
        (_too_few, None, "the lists differ in length"),
        (_on_meta, None, "a tensor on the meta device has no elements to update"),
        (_wrong_option, None, "clipvalue must be a number >= 0, got -1"),
    ],
)
@pytest.mark.parametrize("check_only", [False, True])
def test_a_refusal_is_a_value_and_nothing_is_written(
    corrupt: Callable[[Batch], None], param: int | None, message: str, check_only: bool
) -> None:
    batch = make_batch()
    corrupt(batch)
    kept, versions = [x.clone() for x in written(batch)], [p._version for p in batch.params]
    refusal = kernels.update(batch, check_only=check_only)
    assert refusal is not None
    assert refusal.param == param
    assert refusal.message.startswith(message)
    assert not batch.has_begun
    assert [p._version for p in batch.params] == versions
    for x, was in zip(written(batch), kept, strict=True):
        assert x.is_meta or torch.equal(x, was)


@needs_library
def test_check_only_looks_and_writes_nothing() -> None:
    for options, _ in OPTIONS.values():
        batch = make_batch(**options)
        kept, versions = [x.clone() for x in written(batch)], [p._version for p in batch.params]
        assert kernels.update(batch, check_only=True) is None
        assert not batch.has_begun
        assert [p._version for p in batch.params] == versions
        assert all(map(torch.equal, written(batch), kept))


@needs_library
def test_refusals_of_the_other_ops() -> None:
    params = [torch.ones(2), torch.ones(2)]
    assert kernels.square_sums(params, [torch.ones(2), torch.ones(3)]) == Refusal("its tensors differ in shape", 1)
    batch = make_batch(is_sparse=True)
    found = kernels.first_invalid_indices(batch)
    assert isinstance(found, Tensor)
    assert found.tolist() == [-1] * 4
    batch.square_avgs[3] = torch.zeros(6, 4)
    assert kernels.first_invalid_indices(batch) == Refusal("its tensors differ in shape", 3)
    assert kernels.update(batch) == Refusal("its tensors differ in shape", 3)
    assert not batch.has_begun


class Broken(TorchDispatchMode):
    """An op that fails for a reason of its own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("of memory")


@needs_library
def test_an_error_that_is_no_refusal_leaves_the_batch_begun() -> None:
    """Something may have been written."""
    batch = make_batch()
    with pytest.raises(RuntimeError, match="of memory"), Broken():
        kernels.update(batch)
    assert batch.has_begun


# ---- Traced, and recorded by autograd -------------------------------------------------------------------------------


class Mode(TorchDispatchMode):
    """What ops of the library are called, and which arguments their schemas say are written to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torch_adadelta":
            lists = [x for x, arg in zip(args, func._schema.arguments, strict=False) if arg.is_write]
            self.calls.append((func.name(), sum(map(len, lists))))
        return func(*args, **(kwargs or {}))


@needs_library
def test_a_dispatch_mode_sees_an_op_whose_schema_tells_what_it_writes() -> None:
    batch, expected = make_batch(), make_batch()
    cache = cache_of(batch)
    for _ in range(2):
        with Mode() as mode:
            kernels.update(batch)
            assert kernels.cached_accumulators(batch.square_avgs, batch.acc_deltas) is None
        kernels.update(expected)
        assert mode.calls == [("torch_adadelta::adadelta_", 12)]
    assert all(map(torch.equal, written(batch), written(expected)))
    del cache


@needs_library
def test_fakes_say_what_the_ops_return() -> None:
    batch, sparse = make_batch(), make_batch(is_sparse=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        lists = [[mode.from_tensor(x) for x in tensors] for tensors in batch.lists[:4]]
        fake = Batch(Backend.FUSED, False, False, *lists, [Segment(4, 1.0, 0.9, 1e-7, False)])
        assert kernels.update(fake) is None
        sums = kernels.square_sums(lists[0], lists[1], 0.5, True, torch.tensor(2.0))
        assert isinstance(sums, Tensor)
        assert (sums.shape, sums.dtype, sums.device.type) == ((4,), torch.float64, "cpu")
        parts = [
            [mode.from_tensor(x._indices()) for x in sparse.grads],
            [mode.from_tensor(x._values()) for x in sparse.grads],
        ]
        found = torch.ops.torch_adadelta.first_invalid_indices(lists[0], *parts, *lists[2:], [])
        assert (found.shape, found.dtype) == ((4,), torch.int64)


@needs_library
def test_autograd_records_nothing() -> None:
    batch = make_batch()
    for p in batch.params:
        p.requires_grad_()
    with torch.enable_grad():
        assert kernels.update(batch) is None
        sums = kernels.square_sums(batch.params, [p * 2 for p in batch.params])
    assert isinstance(sums, Tensor)
    assert not sums.requires_grad
    assert all(p.is_leaf and p.grad_fn is None for p in batch.params)


# ---- Cached accumulators --------------------------------------------------------------------------------------------


@needs_library
def test_accumulators_are_cached_for_as_long_as_somebody_has_the_cache() -> None:
    batches = [make_batch() for _ in range(2)]
    caches = [cache_of(batch) for batch in batches]
    assert caches[0].number != caches[1].number
    uses = [weakref.ref(x) for x in batches[0].square_avgs]
    own = torch.ones(6, 5)
    with pytest.raises(RuntimeError, match=r"[Ee]xpected.* references?|use_count|weakref"):
        torch.utils.swap_tensors(batches[0].square_avgs[0], own)
    number = batches[0].accumulators
    del caches[0]
    gc.collect()
    refusal = kernels.update(batches[0])
    assert refusal == Refusal(f"no accumulators are cached under the number {number}", None)
    assert kernels.update(batches[1]) is None
    assert all(use() is not None for use in uses)
    del batches[0]
    gc.collect()
    assert all(use() is None for use in uses)


@needs_library
@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.to("meta"),
        lambda x: x.to(torch.complex64),
        lambda x: torch._neg_view(x),
        lambda x: x.to_sparse(),
        lambda x: x.long(),
    ],
    ids=["meta", "complex", "negated", "sparse", "int"],
)
@pytest.mark.parametrize("which", [0, 1])
def test_accumulators_that_are_not_cached(which: int, make: Callable[[Tensor], Tensor]) -> None:
    """Or, if they are, the update refuses them."""
    batch = make_batch()
    lists = (batch.square_avgs, batch.acc_deltas)
    lists[which][3] = make(lists[which][3])
    cache = kernels.cached_accumulators(*lists)
    if cache is not None:
        batch.accumulators = cache.number
        assert kernels.update(batch) is not None
    whole = make_batch(dtype=torch.complex64)
    assert kernels.cached_accumulators(whole.square_avgs, whole.acc_deltas) is None
    lists[which][3] = torch._neg_view(torch.zeros(6, 5))
    assert kernels.cached_accumulators(*lists) is None
    assert kernels.cached_accumulators(batch.square_avgs[:2], batch.acc_deltas[:1]) is None


@needs_library
def test_no_accumulators_are_cached_while_a_step_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert kernels.cached_accumulators(batch.square_avgs, batch.acc_deltas) is None


@needs_library
def test_what_is_no_refusal_of_accumulators_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("of memory")

    batch = make_batch()
    monkeypatch.setattr(kernels, "_cache_accumulators", fail)
    with pytest.raises(RuntimeError, match="of memory"):
        kernels.cached_accumulators(batch.square_avgs, batch.acc_deltas)


@needs_library
def test_memory_that_has_changed_is_looked_at_anew() -> None:
    batch, expected = make_batch(), make_batch()
    cache = cache_of(batch)
    for step in range(3):
        if step:
            for one in (batch, expected):
                one.square_avgs[step].set_(torch.full((6, 5), 0.25))
        assert kernels.update(batch) is None
        assert kernels.update(expected) is None
        assert all(map(torch.equal, written(batch), written(expected)))
    del cache
