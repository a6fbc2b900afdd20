"""Which backend updates parameters, and the words in which a choice that cannot run is refused."""

from typing import Any

import expecttest
import pytest
import torch
from cases import Path, assert_like_oracle, assert_unchanged, oracle_of, snapshot
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter
from training import path as path
from training import stepped

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels
from torch_adadelta.backends.batch import Backend
from torch_adadelta.step import selection

needs_library = pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")


class Subclass(torch.Tensor):
    """A tensor that may mean anything by its operators."""


def chosen(params: list[torch.Tensor], **options: Any) -> Backend:
    optimizer = AdadeltaKeras(params, **options)
    backend, is_local = selection.select_backend(optimizer.param_groups[0], params)
    assert not is_local
    return backend


@needs_library
def test_none_picks_the_best_that_applies() -> None:
    plain = [Parameter(torch.ones(1))]
    special = [Parameter(torch.ones(1)), torch.ones(1).as_subclass(Subclass)]
    meta = [torch.ones(1, device="meta")]
    assert chosen(plain) is Backend.FUSED
    assert chosen(plain, fused=True) is Backend.FUSED
    assert chosen(plain, foreach=True) is Backend.MULTI_TENSOR
    assert chosen(plain, foreach=False) is Backend.SINGLE_TENSOR  # as in torch.optim
    assert chosen(plain, fused=False) is Backend.SINGLE_TENSOR  # on the CPU foreach has nothing to offer
    assert chosen(plain, foreach=False, fused=True) is Backend.FUSED
    assert chosen(plain, differentiable=True) is Backend.SINGLE_TENSOR
    assert chosen(special) is Backend.SINGLE_TENSOR
    assert chosen(meta) is Backend.SINGLE_TENSOR


def test_multi_tensor_operations_where_they_are_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where nothing speaks against them."""
    assert {"cuda", "xpu"} == selection._FOREACH_DEVICE_TYPES
    monkeypatch.setattr(selection, "_FOREACH_DEVICE_TYPES", {"cpu"})
    plain = [Parameter(torch.ones(1))]
    assert chosen(plain, fused=False) is Backend.MULTI_TENSOR
    assert chosen(plain, foreach=False) is Backend.SINGLE_TENSOR
    assert chosen(plain, differentiable=True) is Backend.SINGLE_TENSOR
    assert chosen([torch.ones(1).as_subclass(Subclass)]) is Backend.SINGLE_TENSOR


def test_local_tensors_of_distributed_ones_decide(mesh: DeviceMesh) -> None:
    """Beside others, which are looked at themselves."""
    plain, spread = Parameter(torch.ones(1)), Parameter(distribute_tensor(torch.ones(1), mesh, [Shard(0)]))
    special = torch.ones(1).as_subclass(Subclass)
    group = AdadeltaKeras([plain]).param_groups[0]
    best = Backend.FUSED if kernels.is_loaded else Backend.SINGLE_TENSOR
    for params, options, expected in (
        ([plain, spread], {}, (best, True)),
        ([spread, spread], {"foreach": True}, (Backend.MULTI_TENSOR, True)),
        ([spread, special], {}, (Backend.SINGLE_TENSOR, True)),
        ([plain, spread], {"differentiable": True}, (Backend.SINGLE_TENSOR, False)),
    ):
        assert selection.select_backend({**group, **options}, params) == expected
    with pytest.raises(RuntimeError, match="`foreach=True` needs plain tensors, got a Subclass"):
        selection.select_backend({**group, "foreach": True}, [spread, special])


def test_without_the_library_python_computes_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [Parameter(torch.ones(1))]
    monkeypatch.setattr(kernels, "has_kernel_for", lambda tensor: False)
    monkeypatch.setattr(kernels, "is_loaded", False)
    monkeypatch.setattr(kernels, "load_error", FileNotFoundError("it is not there"))
    monkeypatch.setattr(kernels, "_warned", set())
    with pytest.warns(RuntimeWarning, match="runs without its compiled library, many times slower: it is not there"):
        assert chosen(plain) is Backend.SINGLE_TENSOR
    assert chosen(plain) is Backend.SINGLE_TENSOR  # a warning would be an error
    monkeypatch.setattr(kernels, "_warned", set())
    assert chosen(plain, fused=False) is Backend.SINGLE_TENSOR  # asked for: nothing to warn of
    assert not kernels._warned
    with pytest.raises(RuntimeError, match="`fused=True` needs the compiled library: it is not there"):
        AdadeltaKeras(plain, fused=True)


@needs_library
def test_a_choice_is_of_each_group() -> None:
    params = [Parameter(torch.ones(1)) for _ in range(3)]
    groups = [{"params": params[:1], "foreach": True}, {"params": params[1:2], "fused": False}, {"params": params[2:]}]
    optimizer = AdadeltaKeras(groups)
    backends = [selection.select_backend(group, group["params"])[0] for group in optimizer.param_groups]
    assert backends == [Backend.MULTI_TENSOR, Backend.SINGLE_TENSOR, Backend.FUSED]


def test_a_subclass_is_updated_by_itself() -> None:
    param = torch.ones(5).as_subclass(Subclass)
    optimizer = AdadeltaKeras([param], 1.0)
    oracle = oracle_of(torch.ones(5), learning_rate=1.0)
    param.grad = torch.full((5,), 0.5).as_subclass(Subclass)
    optimizer.step()
    oracle.step(torch.full((5,), 0.5).numpy())
    state = {key: value.as_subclass(torch.Tensor) for key, value in optimizer.state[param].items()}
    assert_like_oracle(param.as_subclass(torch.Tensor), state, oracle)


class TestChoices(expecttest.TestCase):
    """Explicit choices that cannot run, in words."""

    def message(self, params: Any = None, **options: Any) -> str:
        with pytest.raises(RuntimeError) as caught:
            AdadeltaKeras(params or [Parameter(torch.ones(1))], **options)
        return str(caught.value)

    def test_two_choices(self) -> None:
        self.assertExpectedInline(
            self.message(foreach=True, fused=True),
            """`fused` and `foreach` cannot both be True: choose one, or leave both None for the fastest""",
        )

    def test_differentiable(self) -> None:
        self.assertExpectedInline(
            self.message(fused=True, differentiable=True),
            """`fused` and `differentiable` cannot both be True: autograd records single-tensor operations only; leave `fused` None""",
        )
        self.assertExpectedInline(
            self.message(foreach=True, differentiable=True),
            """`foreach` and `differentiable` cannot both be True: autograd records single-tensor operations only; leave `foreach` None""",
        )

    @needs_library
    def test_subclass_and_device(self) -> None:
        self.assertExpectedInline(
            self.message([Parameter(torch.ones(1)), torch.ones(1).as_subclass(Subclass)], fused=True),
            """`fused=True` needs plain tensors, got a Subclass; leave `fused` None""",
        )
        self.assertExpectedInline(
            self.message([torch.ones(1).as_subclass(Subclass)], foreach=True),
            """`foreach=True` needs plain tensors, got a Subclass; leave `foreach` None""",
        )
        self.assertExpectedInline(
            self.message([torch.ones(1, device="meta")], fused=True),
            """`fused=True` cannot run on meta parameters: there are kernels for cpu and cuda parameters, not for meta; leave `fused` None""",
        )


@needs_library
def test_fused_refuses_a_device_without_a_kernel_at_the_step() -> None:
    optimizer = AdadeltaKeras([Parameter(torch.ones(3)), Parameter(torch.ones(3))], fused=True)
    optimizer.param_groups[0]["params"][1] = Parameter(torch.ones(3, device="meta"))
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(
        RuntimeError,
        match="`fused=True` cannot run on meta parameters: there are kernels for cpu and cuda parameters, not",
    ):
        optimizer.step()
    assert optimizer.iterations == 0
    assert not optimizer.state


@pytest.mark.parametrize(
    ("choice", "error"),
    [
        ({"fused": True, "foreach": True}, "`fused` and `foreach` cannot both be True"),
        ({"fused": True, "foreach": None, "differentiable": True}, "`fused` and `differentiable` cannot both be True"),
        (
            {"fused": None, "foreach": True, "differentiable": True},
            "`foreach` and `differentiable` cannot both be True",
        ),
    ],
)
def test_choices_that_are_written_to_a_group_are_checked(path: Path, choice: dict[str, Any], error: str) -> None:
    optimizer = stepped(path, steps=2)
    for param in optimizer.param_groups[1]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.param_groups[1].update(choice)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=error):
        optimizer.step()
    assert_unchanged(optimizer, before)
