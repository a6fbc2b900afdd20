"""Calls every op of the library with arguments that do not fit; run by test_op_fuzzing.py in a process of its own.

    python op_fuzzing.py COUNT LOG

Every call is written to LOG before it is made: if the process dies, the last line says of what. A call may do its work
or raise an exception that has a message; one that raises must have written nothing, and none may write outside the
tensors it was given. Hypothesis draws the calls, and makes one that fails as small as it can.
"""

import faulthandler
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_adadelta.backends import kernels

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.complex32),
    *(torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn),
)
SHAPES = ((4,), (2, 3), (), (0,), (5, 1), (0, 3), (130,))
NUMBERS = (1.0, 0.0, -1.0, 0.95, 1e-7, 1e-320, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), 2**70, True)
# The hyperparameters of a segment.
FITTING = (1.0, 0.95, 1e-7, 0.0, 0.0, 1.0, 0.9, 1.0, 0.0, 0.0)
NO_TENSORS = (3, 5, 7, 8, 9)  # of them
NO_NUMBERS = (None, "0.1", [], 10**400, 1j)
CACHE_NUMBERS = (0, -1, 1, 2, 3, 10**6, 2**62, -(2**63), 2**63 - 1, 2**63, 10**30, None, 0.5, "1")

_MARGIN = 64  # elements before and after each tensor that nobody may write to


def described(value: Any) -> str:
    """Not the elements: a tensor may have no memory for them, and then PyTorch dies of printing it."""
    if isinstance(value, list):
        return f"[{', '.join(map(described, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    where = "" if value.layout is not torch.strided or value.is_nested else f" {value.stride()}"
    return f"{value.dtype} {value.layout} {value.device} {'' if value.is_nested else tuple(value.shape)}{where}"


def has_its_memory(x: Tensor) -> bool:
    """Whether the storage of a tensor reaches to its end, if it is one that has a storage of elements."""
    if x.layout is not torch.strided or x.is_nested or x.numel() == 0 or x.device.type != "cpu":
        return True
    last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.untyped_storage().nbytes() >= (last + 1) * x.element_size()


class Caller:
    """Draws arguments, calls, and looks what was written."""

    def __init__(self, random: Random, log: Any) -> None:
        self.random = random
        self.log = log
        self.bases: list[Tensor] = []

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with a margin around it, in which a call must write nothing."""
        count = 1
        for size in shape:
            count *= size
        base = torch.ones(count + 2 * _MARGIN, dtype=torch.float32).to(dtype)
        tensor = base[_MARGIN : _MARGIN + count].view(shape)
        self.bases.append(base)
        return tensor

    def spoiled(self, x: Tensor, others: list[Tensor]) -> Any:
        """Something else in the place of a tensor."""
        draw = self.random
        ways: list[Callable[[], Any]] = [
            lambda: None,
            lambda: 3,
            lambda: [x],
            lambda: self.tensor(draw.choice(SHAPES), x.dtype),
            lambda: self.tensor(tuple(x.shape), draw.choice(DTYPES)),
            lambda: draw.choice(others),
            lambda: draw.choice(others).view(-1)[1:],
            lambda: draw.choice(others).view(-1)[:1].expand(max(x.numel(), 1)).view(x.shape),
            lambda: x.to("meta"),
            lambda: x.expand(3, *x.shape),
            lambda: x[None].expand(1000, *x.shape),
            lambda: x.as_strided(x.shape, [0] * x.dim()),
            lambda: x.as_strided(x.shape, [1] * x.dim()),
            lambda: x.transpose(0, -1) if x.dim() else x,
            lambda: x.float().to_sparse(),
            lambda: x.float().view(1, -1).to_sparse_csr(),
            lambda: x.float().to_mkldnn(),
            lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
            lambda: torch.nested.nested_tensor([x.float().view(-1)]),
            lambda: torch.nested.nested_tensor([x.float().view(-1)], layout=torch.jagged),
            lambda: torch._efficientzerotensor(x.shape, dtype=x.dtype),
            lambda: torch._neg_view(x),
            lambda: x.conj(),
            lambda: torch._lazy_clone(x),
            lambda: self.without_memory(x),
            lambda: self.with_little_memory(x),
            lambda: torch.empty(x.shape, dtype=x.dtype).requires_grad_(x.is_floating_point()),
            lambda: x[..., :0],
            lambda: torch.func.functionalize(lambda y: y)(x),
        ]
        try:
            return draw.choice(ways)()
        except (RuntimeError, TypeError, NotImplementedError, IndexError, ValueError):
            return None  # PyTorch makes no such tensor of this one

    @staticmethod
    def without_memory(x: Tensor) -> Tensor:
        y = x.clone()
        y.untyped_storage().resize_(0)
        return y if x.numel() % 2 else torch.empty(64, dtype=x.dtype)[3 : 3 + x.numel()].view(x.shape)

    @staticmethod
    def with_little_memory(x: Tensor) -> Tensor:
        y = torch.ones(x.numel() + 2, dtype=torch.float32).to(x.dtype)[2:].view(x.shape)
        y.untyped_storage().resize_(2 * y.element_size())
        return y

    def lists(self, count: int, kinds: int, dtype: torch.dtype) -> list[list[Any]]:
        shapes = [self.random.choice(SHAPES) for _ in range(count)]
        return [[self.tensor(shape, dtype) for shape in shapes] for _ in range(kinds)]

    def averages(self, params: list[Any]) -> list[Any]:
        T = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
        return [self.tensor(tuple(param.shape), T.get(param.dtype, param.dtype)) for param in params]

    def remainders(self, params: list[Any]) -> list[Any]:
        return [self.tensor(tuple(param.shape), torch.int16) for param in params]

    def spoil(self, lists: list[list[Any]]) -> None:
        """Puts up to three things where they do not belong."""
        draw = self.random
        everything = [x for tensors in lists for x in tensors]
        for _ in range(draw.randrange(4)):
            tensors = draw.choice(lists)
            if not tensors:
                continue
            way = draw.randrange(8)
            if way == 0:
                tensors.pop()
            elif way == 1:
                tensors.append(draw.choice(everything))
            elif way == 2:
                tensors[:] = draw.choice(lists)
            else:
                i = draw.randrange(len(tensors))
                # What is spoiled already may have no memory, and then PyTorch itself dies of some of these.
                if any(tensors[i] is x for x in everything):
                    tensors[i] = self.spoiled(tensors[i], everything)
        for tensors in lists:
            # PyTorch prints what it cannot convert, and dies of a tensor without its memory.
            if not all(isinstance(x, Tensor) for x in tensors):
                tensors[:] = [x for x in tensors if not isinstance(x, Tensor) or has_its_memory(x)]

    def number(self) -> Any:
        return self.random.choice(NO_NUMBERS if self.random.random() < 0.05 else NUMBERS)

    def scalar_tensor(self) -> Any:
        one = self.tensor(self.random.choice([(), (1,), (2,), (0,)]), self.random.choice(DTYPES[:4]))
        choice = self.random.random()
        return None if choice < 0.5 else one if choice < 0.85 else self.spoiled(one, [one])

    def options(self, count: int) -> list[Any]:
        """The arguments of an update after its lists, or the first of them."""
        draw = self.random
        sums = self.tensor((count,), torch.float64)
        given = [
            draw.choice([None, 0.5, self.number()]),
            draw.choice([None, 0.5, self.number()]),
            draw.choice([None, sums, self.spoiled(sums, [sums])]),
            draw.choice([1.0, self.number()]),
            self.scalar_tensor(),
            self.scalar_tensor(),
            draw.choice([1.0, self.number()]),
            self.scalar_tensor(),
            draw.random() < 0.2,
        ]
        return [*self.segments(count), *given[: draw.choice([0, 1, 4, len(given)])]]

    def segments(self, count: int) -> list[Any]:
        """Sizes, hyperparameters and hyperparameter_tensors, mostly such as fit."""
        draw = self.random
        sizes: list[Any] = [count]
        while draw.random() < 0.4:
            part = draw.randint(0, sizes[-1])
            sizes[-1:] = [part, sizes[-1] - part]
        numbers = [x for _ in sizes for x in (FITTING if draw.random() < 0.7 else self.row())]
        tensors = [
            self.scalar_tensor() if k % len(FITTING) not in NO_TENSORS else None
            for k in range(len(numbers) if draw.random() < 0.3 else 0)
        ]
        if draw.random() < 0.15:
            spoiled = draw.choice([sizes, numbers, tensors])
            way = draw.randrange(3)
            if way == 0:
                spoiled.append(draw.choice([-1, 0, 1, 2**62, 2**63, None, self.scalar_tensor()]))
            elif way == 1 and spoiled:
                spoiled.pop()
            elif spoiled:
                spoiled[draw.randrange(len(spoiled))] = draw.choice([-1, 2**63 - 1, -(2**63), 3, self.scalar_tensor()])
        lists = [sizes, numbers, tensors]
        for values, kinds in zip(lists, ((int,), (int, float), (Tensor, type(None))), strict=True):
            # PyTorch prints what it cannot convert, and dies of a tensor without its memory.
            if not all(isinstance(x, kinds) for x in values):
                values[:] = [x for x in values if not isinstance(x, Tensor) or has_its_memory(x)]
        return lists

    def row(self) -> list[Any]:
        flags = [self.random.choice([0.0, 1.0, 1.0, self.number()]) for _ in range(3)]
        numbers = [self.number() for _ in range(5)]
        kept = [self.random.choice([0.0, 0.0, 1.0, 2.0, self.number()]) for _ in range(2)]
        return [*numbers[:3], flags[0], numbers[3], flags[1], numbers[4], flags[2], *kept]

    def indices(self, params: list[Any]) -> tuple[list[Any], list[Any]]:
        draw = self.random
        indices, values = [], []
        for param in params:
            dims, count = draw.randint(0, param.dim()), draw.randint(0, 4)
            index = self.tensor((dims, count), torch.int64)
            index.zero_()
            if index.numel() and draw.random() < 0.3:
                index.view(-1)[draw.randrange(index.numel())] = draw.choice([-1, 1, 7, 2**62, -(2**63)])
            if draw.random() < 0.1 and param.numel() * param.element_size() >= 8 * dims * count > 0:
                memory = param.view(-1).view(torch.uint8)[: 8 * dims * count]
                if memory.data_ptr() % 8 == 0:
                    memory.zero_()
                    index = memory.view(torch.int64).view(dims, count)
            indices.append(index)
            values.append(self.tensor((count, *param.shape[dims:]), param.dtype))
        return indices, values

    def arguments(self) -> tuple[str, Any, list[Any]]:
        draw = self.random
        adadelta = torch.ops.torch_adadelta
        dtype = torch.float32 if draw.random() < 0.5 else draw.choice(DTYPES)
        count = draw.randint(0, 3)
        name = draw.choice(["adadelta_", "cached", "cache", "square_sums", "sparse", "invalid_indices", "numbers"])
        if name == "adadelta_":
            lists = self.lists(count, 4, dtype)
            lists.append([] if draw.random() < 0.3 else self.averages(lists[0]))
            lists.append([] if draw.random() < 0.7 else self.remainders(lists[0]))
            self.spoil(lists)
            return name, adadelta.adadelta_.default, [*lists, *self.options(count)]
        if name == "cached":
            lists = self.lists(max(count, 1), 4, dtype)
            if draw.random() < 0.5:
                self.spoil(lists)
            params, grads, square_avgs, acc_deltas = lists
            number = draw.choice(CACHE_NUMBERS)
            if draw.random() < 0.7:
                try:
                    number = adadelta.cache_accumulators(square_avgs, acc_deltas)
                    if draw.random() < 0.2:
                        adadelta.drop_accumulators(number)
                except Exception:
                    pass
            return name, adadelta.adadelta_.cached, [params, grads, number, *self.options(max(count, 1))]
        if name == "cache":
            lists = self.lists(count, 2, dtype)
            self.spoil(lists)
            return name, adadelta.cache_accumulators.default, lists
        if name == "square_sums":
            lists = self.lists(count, 2, dtype)
            self.spoil(lists)
            rest = [
                draw.choice([None, self.number()]),
                draw.choice([False, True, None]),
                self.scalar_tensor(),
                self.number(),
            ]
            return name, adadelta.grad_square_sums.default, [*lists, *rest[: draw.randint(0, len(rest))]]
        if name in ("sparse", "invalid_indices"):
            params, square_avgs, acc_deltas = self.lists(count, 3, dtype)
            indices, values = self.indices(params)
            remainders = [] if draw.random() < 0.7 else self.remainders(params)
            lists = [params, indices, values, square_avgs, acc_deltas, remainders]
            self.spoil(lists)
            if name == "invalid_indices":
                return name, adadelta.first_invalid_indices.default, lists
            return name, adadelta.sparse_adadelta_.default, [*lists, *self.options(count)]
        op = draw.choice([adadelta.drop_accumulators.default, adadelta.set_cpu_capability.default])
        return name, op, [draw.choice(CACHE_NUMBERS)]

    def call(self) -> str:
        """Whether the call was refused, or done."""
        best = kernels.cpu_capability()
        name, op, arguments = self.arguments()
        before = [(base.view(-1).view(torch.uint8), base.view(-1).view(torch.uint8).clone()) for base in self.bases]
        self.log.write(f"{name} {described(arguments)}\n")
        self.log.flush()
        raised: Exception | None = None
        try:
            op(*arguments)
        except Exception as error:
            raised = error
        kernels.set_cpu_capability(best)
        if raised is not None:
            assert str(raised).strip(), f"{type(raised)} without a message"
        if raised is not None or name in ("cache", "square_sums", "invalid_indices", "numbers"):
            for now, was in before:
                assert torch.equal(now, was), f"{name} wrote, and then: {raised}"
        for base, (now, was) in zip(self.bases, before, strict=True):
            # Of a tensor that was handed over transposed or shifted, the margin may be part.
            margin = _MARGIN * base.element_size() // 2
            assert torch.equal(now[:margin], was[:margin])
            assert torch.equal(now[-margin:], was[-margin:])
        return "done" if raised is None else "refused"


def main() -> None:
    count, path = int(sys.argv[1]), sys.argv[2]
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    outcomes: Counter[str] = Counter()
    with open(path, "w") as log:

        @settings(
            max_examples=count,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.randoms(use_true_random=False))
        def call(random: Random) -> None:
            outcomes[Caller(random, log).call()] += 1

        call()
    print(outcomes["refused"], outcomes["done"])


if __name__ == "__main__":
    main()
