"""What optimizers are given to do: parameters of some shapes and a dtype, and how a step on them is measured."""

from functools import partial
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
    fits_cache: bool = True  # measured with warm caches, and with cold ones
    threads: int | None = None  # None: all
    clips: bool = False  # with the clip options beside the unclipped step
    compiles: bool = False  # with torch.compile, which takes about a second for three tensors
    limit: str = ""  # what bounds the speed of a fused step, in words
    occurring: int = 0  # rows in each sparse gradient of a table, the only tensor; 0: dense gradients

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
    def of(cls, workload: Workload, device: str = "cpu") -> "Tensors":
        """Gradients between 0.1 and 1 in size, of random sign; parameters of the sign that keeps them away from 0."""
        # A period is enough: numbers of one size take one time.
        period = 2**20
        generator = torch.Generator().manual_seed(0)
        numbers = torch.empty(period).uniform_(-0.9, 0.9, generator=generator)
        numbers += numbers.sign().mul_(0.1)
        numbers = numbers.to(device, workload.dtype)
        if workload.occurring:
            return cls._of_table(workload, device, generator)
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
    def _of_table(cls, workload: Workload, device: str, generator: torch.Generator) -> "Tensors":
        """A table whose gradients are sparse: rows in random order, anywhere in it."""
        (shape,) = workload.shapes
        full = partial(torch.full, dtype=workload.dtype, device=device)
        table, *squares = (full(shape, value) for value in (1.0, 0.25, 0.25))
        values = full((workload.occurring, *shape[1:]), 0.5)
        rows = torch.randint(shape[0], (GRADIENTS, 1, workload.occurring), generator=generator).to(device)
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
_MODELS: Final = {name: tuple(getattr(shapes, name)()) for name in ("resnet50", "vit_b16", "gpt2_small")}

# What caches do not hold is timed in longer turns.
_large = partial(Workload, fits_cache=False, turn=0.03)

WORKLOADS: Final = (
    _large("1x16M", one(2**24), budget=30, clips=True, compiles=True, limit=MEMORY),
    Workload("200x4096", many(200, 4096), budget=9, turn=5e-3, clips=True, compiles=True, limit=ARITHMETIC),
    Workload("1000x16", many(1000, 16), budget=9, turn=5e-3, clips=True, limit=HOST),
    Workload("1x16", one(16), budget=4, turn=5e-4, compiles=True, limit=HOST),
    Workload("1x32K, 1 thread", one(2**15), turn=2e-3, threads=1, compiles=True, limit=ARITHMETIC),
    *(_large(name, of, budget=6, limit=MEMORY) for name, of in _MODELS.items()),
    _large("embedding", tuple(shapes.embedding(10**6)), budget=4, limit=MEMORY),
    _large("1x16M-bfloat16", one(2**24), _BFLOAT16, budget=8, clips=True, limit=MEMORY_16BIT),
    Workload("200x4096-bfloat16", many(200, 4096), _BFLOAT16, turn=5e-3, limit=ARITHMETIC),
    Workload("1000x16-bfloat16", many(1000, 16), _BFLOAT16, turn=5e-3, limit=HOST),
    *(_large(f"{name}-bfloat16", of, _BFLOAT16, budget=5, limit=MEMORY_16BIT) for name, of in _MODELS.items()),
    _large("1x16M-float16", one(2**24), torch.float16, budget=5, limit=MEMORY_16BIT),
)

# A dtype of each table of the documentation.
_quick = partial(Workload, budget=0.3, turn=2e-3)
QUICK: Final = (
    _quick("1x256K", one(2**18), clips=True, limit=ARITHMETIC),
    _quick("100x16", many(100, 16), clips=True, limit=HOST),
    _quick("100x16-bfloat16", many(100, 16), _BFLOAT16, limit=HOST),
    _quick("100x16-float16", many(100, 16), torch.float16, limit=HOST),
)


def of_cuda(*, quick: bool) -> list[Workload]:
    """What a CUDA device is given, in float32 and bfloat16. torch.compile takes minutes for many tensors."""
    workloads = []
    for dtype, suffix, memory in (
        (torch.float32, "", MEMORY),
        (_BFLOAT16, "-bfloat16", "memory (14 bytes an element)"),
    ):
        of = partial(Workload, dtype=dtype, budget=1 if quick else 5, turn=0.02, fits_cache=False, clips=True)
        workloads += [
            of(f"1x64M{suffix}", one(2**26), compiles=True, limit=memory),
            of(f"1x1G{suffix}", one(2**30), compiles=True, limit=memory),
            of(f"resnet50{suffix}", _MODELS["resnet50"], compiles=True, limit=memory),
            of(f"1000x16{suffix}", many(1000, 16), limit=HOST),
        ]
    return [workload for workload in workloads if not quick or workload.numel < 2**30]


def by_elements(*, quick: bool) -> list[Workload]:
    """One tensor of more and more elements, 1 Ki to 64 Mi."""
    budget, exponents = (0.1, (12, 18)) if quick else (0.8, range(10, 27, 2))
    return [
        Workload(f"1x{2**e}", one(2**e), budget=budget, turn=2e-3 if e < 22 else 0.02, fits_cache=e < 22)
        for e in exponents
    ]


def by_tensors(*, quick: bool) -> list[Workload]:
    """More and more tensors of 16 elements, 1 to 4096."""
    counts = (4, 64) if quick else (1, 4, 16, 64, 256, 1024, 4096)
    return [Workload(f"{n}x16", many(n, 16), budget=0.1 if quick else 1.0, turn=2e-3) for n in counts]


def by_rows(*, quick: bool) -> list[Workload]:
    """Tables of more and more rows of 64 numbers, of which 1000 occur in each sparse gradient."""
    of = partial(
        _large, budget=0.2 if quick else 4, turn=2e-3 if quick else 0.02, clips=True, occurring=1000, limit=ROWS
    )
    rows = (10_000,) if quick else (10_000, 100_000, 1_000_000, 10_000_000)
    return [of(f"{n}x{TABLE_WIDTH}", ((n, TABLE_WIDTH),)) for n in rows]


TABLE_WIDTH: Final = 64


def by_threads(*, quick: bool) -> list[Workload]:
    """Work for one thread and for more."""
    exponents = (16,) if quick else (4, 14, 15, 16, 17, 18, 20, 24)
    return [
        Workload("1000x16", many(1000, 16), budget=0.1 if quick else 2, turn=5e-3),
        *(
            Workload(f"1x{2**e}", one(2**e), budget=0.1 if quick else 1, turn=2e-3, fits_cache=e < 22)
            for e in exponents
        ),
    ]


def of_operations(*, quick: bool) -> list[Workload]:
    """What everything but the step is measured on."""
    of = partial(Workload, fits_cache=False)
    return [
        of("1000x16", many(1000, 16), budget=0.5 if quick else 6),
        of("resnet50", _MODELS["resnet50"], budget=0.5 if quick else 8),
    ]


def of_training(*, quick: bool) -> list[Workload]:
    """The parameters of the example on handwritten digits, which has one thread."""
    net = ((1, 32, 3, 3), (32,), (32, 64, 3, 3), (64,), (1024, 128), (128,), (128, 10), (10,))
    return [Workload("digits", net, budget=1 if quick else 12, turn=0.05, fits_cache=False, threads=1)]


OF_PART: Final = {
    "elements": by_elements,
    "tensors": by_tensors,
    "threads": by_threads,
    "sparse": by_rows,
    "operations": of_operations,
    "training": of_training,
}
