"""What optimizers are given to do: parameters of some shapes and a dtype, and how they are measured."""

from typing import Final, NamedTuple

import shapes
import torch
from shapes import Shape
from torch import Tensor
from torch.nn import Parameter


class Workload(NamedTuple):
    """Parameters, and how a step on them is measured."""

    name: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype = torch.float32
    budget: float = 3  # seconds of measuring
    turn: float = 0.01  # the least number of seconds that are timed together
    fits_cache: bool = True
    threads: int | None = None  # None: all
    clips: bool = False  # with the clip options beside the unclipped step
    compiles: bool = False  # with torch.compile, which takes about a second for three tensors
    limit: str = ""  # what bounds the speed of a fused step, in words
    occurring: int = 0  # rows that occur in the sparse gradient of a table, the only tensor; 0: dense gradients

    @property
    def numel(self) -> int:
        """The number of elements of all parameters."""
        return shapes.count(self.shapes)

    @property
    def dtype_name(self) -> str:
        """As PyTorch prints it, without the module."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        """Its shapes and dtype in words."""
        if self.occurring:
            rows, width = self.shapes[0]
            return f"{self.occurring:,} rows of a table of {rows:,} x {width}, {self.dtype_name}"
        tensors = f"{len(self.shapes):,} tensor{'s' if len(self.shapes) > 1 else ''}"
        if len(set(self.shapes)) == 1:
            (numel,) = self.shapes[0]
            return f"{tensors} of {numel:,} elements, {self.dtype_name}"
        return f"{tensors}, {self.numel:,} elements, {self.dtype_name}"


# The sparse gradients of a table.
GRADIENTS: Final = 200


class Tensors(NamedTuple):
    """Parameters with their gradients, and Adadelta's state at the fixed point that it reaches under them.

    With square_avg = acc_delta = grad^2, no step makes the numbers easier or harder, and each moves the parameters by
    lr * grad. The gradients keep a distance from 0, so that nothing becomes subnormal, not even in float16.

    A table with sparse gradients has many of them, which take turns: else the caches would hold the rows that occur.
    """

    params: list[Parameter]
    grads: list[Tensor]
    square_avgs: list[Tensor]
    acc_deltas: list[Tensor]

    @classmethod
    def of(cls, workload: Workload) -> "Tensors":
        """Gradients between 0.1 and 1 in size, of random sign; parameters of the sign that keeps them away from 0."""
        # A period is enough: numbers of one size take one time.
        period = 2**20
        generator = torch.Generator().manual_seed(0)
        numbers = torch.empty(period).uniform_(-0.9, 0.9, generator=generator)
        numbers += numbers.sign().mul_(0.1)
        numbers = numbers.to(workload.dtype)
        if workload.occurring:
            return cls._of_table(workload, generator)
        params, grads, squares = [], [], []
        for shape in workload.shapes:
            numel = shapes.count([shape])
            grad = numbers.repeat(-(-numel // period))[:numel].clone().reshape(shape)
            params.append(Parameter(-grad))
            params[-1].grad = grad
            grads.append(grad)
            squares.append(grad.square())
        return cls(params, grads, squares, [square.clone() for square in squares])

    @classmethod
    def _of_table(cls, workload: Workload, generator: torch.Generator) -> "Tensors":
        """A table whose gradients are sparse: rows in random order, anywhere in it."""
        (shape,) = workload.shapes
        table, *squares = (torch.full(shape, value, dtype=workload.dtype) for value in (1.0, 0.25, 0.25))
        values = torch.full((workload.occurring, *shape[1:]), 0.5, dtype=workload.dtype)
        rows = torch.randint(shape[0], (GRADIENTS, 1, workload.occurring), generator=generator)
        grads = [torch.sparse_coo_tensor(indices, values, shape, check_invariants=True) for indices in rows]
        return cls([Parameter(table)], grads, squares[:1], squares[1:])


def one(numel: int) -> tuple[Shape, ...]:
    """The shapes of one tensor."""
    return ((numel,),)


def many(tensors: int, numel: int) -> tuple[Shape, ...]:
    """The shapes of some equal tensors."""
    return ((numel,),) * tensors


MEMORY: Final = "memory (28 bytes an element)"
MEMORY_16BIT: Final = "memory (14 bytes an element) and arithmetic, about equal"
ARITHMETIC: Final = "arithmetic (two roots and a division an element), then the host"
ROWS: Final = "finding rows: each is a few cache lines, anywhere in memory"
HOST: Final = "the host: Python, the dispatcher, reading the lists"

_BFLOAT16: Final = torch.bfloat16

WORKLOADS: Final = (
    Workload("1x16M", one(2**24), budget=30, turn=0.03, fits_cache=False, clips=True, compiles=True, limit=MEMORY),
    Workload("200x4096", many(200, 4096), budget=9, turn=5e-3, clips=True, compiles=True, limit=ARITHMETIC),
    Workload("1000x16", many(1000, 16), budget=9, turn=5e-3, clips=True, limit=HOST),
    Workload("1x16", one(16), budget=4, turn=5e-4, compiles=True, limit=HOST),
    Workload("1x32K, 1 thread", one(2**15), turn=2e-3, threads=1, compiles=True, limit=ARITHMETIC),
    Workload("resnet50", tuple(shapes.resnet50()), budget=6, turn=0.03, fits_cache=False, limit=MEMORY),
    Workload("vit_b16", tuple(shapes.vit_b16()), budget=6, turn=0.03, fits_cache=False, limit=MEMORY),
    Workload("gpt2_small", tuple(shapes.gpt2_small()), budget=6, turn=0.03, fits_cache=False, limit=MEMORY),
    Workload("embedding", tuple(shapes.embedding(10**6)), budget=4, turn=0.03, fits_cache=False, limit=MEMORY),
    Workload(
        "1x16M-bfloat16", one(2**24), _BFLOAT16, budget=8, turn=0.03, fits_cache=False, clips=True, limit=MEMORY_16BIT
    ),
    Workload("200x4096-bfloat16", many(200, 4096), _BFLOAT16, turn=5e-3, limit=ARITHMETIC),
    Workload("1000x16-bfloat16", many(1000, 16), _BFLOAT16, turn=5e-3, limit=HOST),
    *(
        Workload(f"{name}-bfloat16", tuple(of()), _BFLOAT16, budget=5, turn=0.03, fits_cache=False, limit=MEMORY_16BIT)
        for name, of in (("resnet50", shapes.resnet50), ("vit_b16", shapes.vit_b16), ("gpt2_small", shapes.gpt2_small))
    ),
    Workload("1x16M-float16", one(2**24), torch.float16, budget=5, turn=0.03, fits_cache=False, limit=MEMORY_16BIT),
)

QUICK: Final = (
    Workload("1x256K", one(2**18), budget=0.3, clips=True, limit=ARITHMETIC),
    Workload("100x16", many(100, 16), budget=0.3, clips=True, turn=2e-3, limit=HOST),
    Workload("100x16-bfloat16", many(100, 16), _BFLOAT16, budget=0.3, turn=2e-3, limit=HOST),
)


def by_elements(*, quick: bool) -> list[Workload]:
    """One tensor of more and more elements, 1 Ki to 64 Mi."""
    return [
        Workload(
            f"1x{2**exponent}",
            one(2**exponent),
            budget=0.1 if quick else 0.8,
            turn=2e-3 if exponent < 22 else 0.02,
            fits_cache=exponent < 22,
        )
        for exponent in ((12, 18) if quick else range(10, 27, 2))
    ]


def by_tensors(*, quick: bool) -> list[Workload]:
    """More and more tensors of 16 elements, 1 to 4096."""
    counts = (4, 64) if quick else (1, 4, 16, 64, 256, 1024, 4096)
    return [Workload(f"{n}x16", many(n, 16), budget=0.1 if quick else 1.0, turn=2e-3) for n in counts]


TABLE_WIDTH: Final = 64


def by_rows(*, quick: bool) -> list[Workload]:
    """Tables of more and more rows of 64 numbers, of which 1000 occur in each sparse gradient."""
    budget, turn = (0.2, 2e-3) if quick else (4, 0.02)
    return [
        Workload(
            f"{rows}x{TABLE_WIDTH}",
            ((rows, TABLE_WIDTH),),
            budget=budget,
            turn=turn,
            fits_cache=False,
            clips=True,
            occurring=1000,
            limit=ROWS,
        )
        for rows in ((10_000,) if quick else (10_000, 100_000, 1_000_000, 10_000_000))
    ]


def by_threads(*, quick: bool) -> list[Workload]:
    """Work for one thread and for more."""
    return [
        Workload("1000x16", many(1000, 16), budget=0.1 if quick else 2, turn=5e-3),
        *(
            Workload(f"1x{2**e}", one(2**e), budget=0.1 if quick else 1, turn=2e-3, fits_cache=e < 22)
            for e in ((16,) if quick else (4, 14, 15, 16, 17, 18, 20, 24))
        ),
    ]
