"""Models whose gradients are exact, and their training: on one process, and on a part of the batch.

The models' losses are linear in the parameters and their data are integers: gradients, and sums of them over processes in
any order, are exact, so that all bits must be those of one process that sees the whole batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from cases import assert_same_bits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torch_adadelta import AdadeltaKeras, schedules
from torch_adadelta.backends import dtensor, kernels

BATCH = 12
STEPS = 4

# What a step may do; each is compared with one process.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipvalue": {"clipvalue": 3.0},
    "clipnorm": {"clipnorm": 2.0},
    "global_clipnorm": {"global_clipnorm": 5.0},
    "both": {"clipvalue": 20.0, "global_clipnorm": 5.0},
    "schedule and decay": {"learning_rate": schedules.ExponentialDecay(1.0, 2, 0.5), "decay": 0.25},
    "single_tensor": {"foreach": False, "clipnorm": 2.0},
    "foreach": {"foreach": True, "global_clipnorm": 5.0},
    "averages": {"use_ema": True, "ema_momentum": 0.75, "weight_decay": 0.1, "ema_overwrite_frequency": 3},
    "bfloat16 state": {"state_dtype": torch.bfloat16, "clipnorm": 2.0},
    "masters": {"master_weights": True, "state_dtype": torch.float32, "use_ema": True, "weight_decay": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2, "use_ema": True, "clipnorm": 2.0, "loss_scale_factor": 4.0},
}
if kernels.is_loaded:
    OPTIONS["fused"] = {"fused": True, "clipnorm": 2.0}


class Model(nn.Module):
    """Parameters whose rows do not divide evenly among two or three processes, one of which gets none of `one`."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.five = nn.Parameter(torch.zeros(5, 3, dtype=dtype))
        self.one = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.four = nn.Parameter(torch.ones(4, 2, dtype=dtype))
        self.scalar_like = nn.Parameter(torch.ones(1, 1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.five.dtype)
        return (
            (x[:, :5] @ self.five).sum()
            + (x.sum(1) * self.one).sum()
            + (x[:, :4] @ self.four).sum()
            + (x[:, :1] @ self.scalar_like).sum()
        )


def data(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(-3, 4, (BATCH, 5), generator=generator).float()


def shard_of(batch: Tensor) -> Tensor:
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def full(tensor: Tensor) -> Tensor:
    if dtensor.is_dtensor(tensor) and tensor.dtype is torch.int16:  # which no process group moves
        return full(tensor.int()).short()
    return (tensor.full_tensor() if dtensor.is_dtensor(tensor) else tensor).detach().clone()


def train(
    model: Callable[..., Tensor], optimizer: torch.optim.Optimizer, steps: range, of: Callable[[Tensor], Tensor]
) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(of(data(step))).backward()
        optimizer.step()


def everything(model: nn.Module, optimizer: AdadeltaKeras) -> dict[str, Tensor]:
    result = {}
    for name, param in model.named_parameters():
        name = name.removeprefix("module.")
        result[name] = full(param)
        for key, state in optimizer.state.get(param, {}).items():
            result[f"{name}.{key}"] = full(state)
    return result


def dtype_for(options: dict[str, Any]) -> torch.dtype:
    """The dtype of a model that is trained with these options."""
    return torch.bfloat16 if options.get("master_weights") else torch.float32


def alone(options: dict[str, Any], steps: int = STEPS) -> tuple[dict[str, Tensor], int]:
    model = Model(dtype_for(options))
    optimizer = AdadeltaKeras(model.parameters(), **{"learning_rate": 1.0, **options})
    train(model, optimizer, range(steps), lambda batch: batch)
    return everything(model, optimizer), optimizer.iterations


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    assert ours.keys() == expected.keys(), what
    for name, tensor in ours.items():
        assert_same_bits(tensor, expected[name], f"{name} {what}")


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


class Sum(Model):
    """FSDP2 and DDP take the mean of gradients; of these it is the sum, and an integer again."""

    def forward(self, x: Tensor) -> Tensor:
        return dist.get_world_size() * super().forward(x)


def whole_batch(batch: Tensor) -> Tensor:
    return batch


def sharded_model(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """The model after `fully_shard` with these options."""
    model = Sum(dtype)
    fully_shard(model, **options)
    return model


class Heads(nn.Module):
    """Layers for tensor parallelism, and `scale` without it. The loss is linear in each parameter."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.column = nn.Linear(5, 6, dtype=dtype)
        self.row = nn.Linear(4, 3, dtype=dtype)
        self.table = nn.Embedding(8, 3, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(5, dtype=dtype))
        for param in self.parameters():
            nn.init.ones_(param)

    def forward(self, x: Tensor) -> Tensor:
        rows, x = x.long() + 4, x.to(self.scale.dtype)
        factors = torch.tensor([1.0, -1.0, 2.0, -2.0, 1.0, 1.0], dtype=x.dtype)
        return (
            (self.column(x) * factors).sum()
            + (self.row(x[:, :4]) * factors[:3]).sum()
            + (self.table(rows) * factors[:3]).sum()
            + (x * self.scale).sum()
        )


HEADS_PLAN = {
    "column": ColwiseParallel(output_layouts=Replicate()),
    "row": RowwiseParallel(input_layouts=Replicate()),
    "table": RowwiseParallel(input_layouts=Replicate()),
}


def parallel(model: nn.Module, plan: dict[str, Any]) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The loss of a model and the part of a batch that it sees, on one process or all.

    Four processes share the model by FSDP2 and, two by two, by tensor parallelism; fewer by FSDP2 alone.
    """
    if not dist.is_initialized():
        return model, whole_batch
    if dist.get_world_size() < 4:
        fully_shard(model)
        return lambda x: dist.get_world_size() * model(x), shard_of
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    return lambda x: 2 * model(x), lambda batch: batch.chunk(2)[mesh.get_local_rank("data")]
