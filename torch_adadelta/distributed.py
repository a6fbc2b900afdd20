"""Sums over processes: `all_reduce_sum`, a `gradient_aggregator`, and the norms of `norm_group`."""

import functools
import hashlib
import math
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from types import FrameType
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from torch_adadelta.backends.functional import coo_components, is_sparse, overlaps_itself

_P = TypeVar("_P")

_PLAIN_TYPES: Final = (Tensor, Parameter)


@dataclass(frozen=True)
class AllReduceSum:
    """Sums every gradient over the processes of a group, as tf.keras sums over the replicas of a strategy.

    ``all_reduce_sum`` is the instance with the defaults; pass it as ``gradient_aggregator``. If the loss is a sum over
    a shard of the batch, every process takes the step of one process that sees the whole batch. If the loss is a mean,
    divide it by the number of processes. Do not sum gradients that DistributedDataParallel or FSDP has reduced already.

    Args:
        group (ProcessGroup, optional): the process group. None means the default group at the time of the call.
            (default: None)
        bucket_bytes (int, optional): the largest size of a bucket. Gradients of one device and dtype are packed into
            buckets in list order, and each bucket is one call of the backend. A larger gradient has a call of its own.
            The default is that of DistributedDataParallel. (default: 25 MiB)
        check (bool, optional): compares the lists of all processes before any gradient is sent. This costs one call
            with a few integers. The host waits for the other processes, but not for work queued on a CUDA device.
            Without the check, lists that differ mix up gradients, crash the backend or wait for its timeout.
            (default: True)

    An instance takes a list of (gradient, parameter) tuples and returns such a list with the same parameters. All
    processes of the group must call it with the same number of gradients, of the same shapes and dtypes in the same
    order. A process without gradients passes an empty list.

    The sum of sparse gradients (``torch.sparse_coo``) is a new uncoalesced Tensor with the COO entries of all
    processes, in the order of the ranks. The update adds them in that order. The gradients of one device travel in one
    ``all_gather``, in which each process sends as many bytes as the process with the most.

    The sum of dense gradients is computed in their dtype, complex numbers as pairs of reals. All processes get the same
    bits, as ``torch.distributed.all_reduce`` promises. The backend chooses the order of summation, on which the last
    bits may depend with more than two processes. Sums are written into the gradients, which are copies when an
    optimizer passes them. A gradient that cannot be written to, because it is lazily conjugated or negated or its
    elements share memory, is returned as a new Tensor. While the sums run, all gradients exist twice, except those that
    are contiguous and alone in their bucket.

    With one process, the gradients are returned unchanged.

    Instances can be compared and copied (a copy is the instance itself) and, if ``group`` is None, pickled.

    Raises:
        TypeError: if a gradient is not a plain Tensor.
        ValueError: if ``bucket_bytes`` is not positive.
        RuntimeError: if there is no process group, or this process is not in it; if a gradient has a compressed sparse
            layout, requires grad while autograd is on, or is on a device that the backends of the group do not serve.
            With ``check``, in every process, if the lists differ or another process refused a gradient.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> model(torch.ones(2, 3)).sum().backward()
        >>> [(grad, param)] = all_reduce_sum([(model.bias.grad, model.bias)])
        >>> grad
        tensor([2.])
        >>> torch.distributed.destroy_process_group()

    Source: ``OptimizerV2._aggregate_gradients`` in ``tensorflow/python/keras/optimizer_v2/optimizer_v2.py``, TensorFlow
    2.4. Its default is ``all_reduce_sum_gradients`` of ``optimizer_v2/utils.py``.
    """

    group: "dist.ProcessGroup | None" = None
    _: KW_ONLY
    bucket_bytes: int = 25 * 2**20
    check: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.bucket_bytes, bool) or not isinstance(self.bucket_bytes, int):
            raise TypeError(f"bucket_bytes must be an int, got {self.bucket_bytes!r}")
        if self.bucket_bytes <= 0:
            raise ValueError(f"bucket_bytes must be positive, got {self.bucket_bytes}")

    def __deepcopy__(self, memo: dict[int, Any]) -> "AllReduceSum":
        # Immutable, and a process group cannot be copied: an optimizer with one still can.
        return self

    def __call__(self, grads_and_params: Iterable[tuple[Tensor, _P]]) -> list[tuple[Tensor, _P]]:
        """Returns the tuples with every gradient summed over the processes.

        Args:
            grads_and_params (iterable): (gradient, parameter) tuples.
        """
        world_size = _world_size(self.group)
        pairs: list[tuple[Tensor, _P]] = []
        grads: list[Tensor] = []
        refusal: Exception | None = None
        try:
            pairs = list(grads_and_params)
            grads = [grad for grad, _ in pairs]
            backends = dist.get_backend_config(self.group)
            for position, grad in enumerate(grads):
                _check_gradient(position, grad, backends)
        except Exception as error:
            refusal = error
        if world_size == 1 or not self.check:
            if refusal is not None:
                raise refusal
            if world_size == 1:
                return pairs

        # One tensor at two places of the list is summed once.
        distinct = list({id(grad): grad for grad in grads}.values())
        if self.check:
            # A process that raised by itself would leave the others waiting: it tells them first.
            _check_agreement(self.group, distinct, self.bucket_bytes, refusal)
        dense = [grad for grad in distinct if not is_sparse(grad)]
        sums = [_with_own_memory(grad) for grad in dense]
        _all_reduce(sums, self.bucket_bytes, self.group)
        sum_of = dict(zip(map(id, dense), sums, strict=True))
        sparse = [grad for grad in distinct if is_sparse(grad)]
        sum_of.update(zip(map(id, sparse), _concatenated(sparse, self.group), strict=True))
        return [(sum_of[id(grad)], param) for grad, param in pairs]


all_reduce_sum: Final = AllReduceSum()


# ---- The sums -------------------------------------------------------------------------------------------------------


def _with_own_memory(grad: Tensor) -> Tensor:
    """The gradient, or a copy if writing to it would not store the values it is to have."""
    grad = grad.resolve_conj().resolve_neg()
    if grad.is_contiguous() or not overlaps_itself(grad):
        return grad
    return grad.clone(memory_format=torch.contiguous_format)


def _all_reduce(tensors: list[Tensor], bucket_bytes: int, group: "dist.ProcessGroup | None") -> None:
    """Sums tensors over the processes, in place."""
    # All calls are begun before the first is waited for, so that one bucket is packed while others travel.
    begun = []
    for bucket in _buckets(tensors, bucket_bytes):
        parts: list[Tensor] = []
        if len(bucket) == 1 and bucket[0].is_contiguous():
            flat = bucket[0]
        else:
            sizes = [tensor.numel() for tensor in bucket]
            flat = torch.empty(sum(sizes), dtype=bucket[0].dtype, device=bucket[0].device)
            parts = [part.view_as(tensor) for part, tensor in zip(flat.split(sizes), bucket, strict=True)]
            torch._foreach_copy_(parts, bucket)
        begun.append((dist.all_reduce(flat, group=group, async_op=True), bucket, parts))
    for work, bucket, parts in begun:
        work.wait()
        if parts:
            torch._foreach_copy_(bucket, parts)


def _buckets(tensors: list[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Splits tensors, empty ones left out, into lists of one device and dtype that fit one buffer each.

    The split depends on nothing that may differ between processes: not on the layouts, nor on a device's index.
    """
    buckets: list[list[Tensor]] = []
    open_buckets: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        key, size = (tensor.device, tensor.dtype), tensor.numel() * tensor.element_size()
        if size >= bucket_bytes:
            buckets.append([tensor])
            continue
        bucket, filled = open_buckets.get(key, ([], 0))
        if not bucket or filled + size > bucket_bytes:
            bucket, filled = [], 0
            buckets.append(bucket)
        bucket.append(tensor)
        open_buckets[key] = bucket, filled + size
    return buckets


# ---- Sparse gradients -----------------------------------------------------------------------------------------------

# So that what follows some bytes can be read as numbers of any dtype.
_ALIGNMENT: Final = 16


def _concatenated(grads: list[Tensor], group: "dist.ProcessGroup | None") -> list[Tensor]:
    """Sparse gradients with the COO entries of all processes, in the order of the ranks."""
    if not grads:
        return []
    counts = _gathered([grad._nnz() for grad in grads], group, grads)
    of_device: dict[torch.device, list[int]] = {}
    for i, grad in enumerate(grads):
        of_device.setdefault(grad.device, []).append(i)
    result = list(grads)
    # All devices are begun before the first is waited for.
    begun = []
    for device, same in of_device.items():
        mine = torch.cat([part for i in same for part in map(_to_bytes, coo_components(grads[i]))])
        longest = max(sum(sum(_byte_sizes(grads[i], row[i])) for i in same) for row in counts)
        padded = torch.nn.functional.pad(mine, (0, longest - len(mine)))
        # Not rows of one tensor: without any bytes, those would begin at offsets that no other dtype can be read from.
        received = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in counts]
        work = dist.all_gather(received, padded, group=group, async_op=True) if longest > 0 else None
        begun.append((work, same, received, padded))  # what travels must not be freed yet
    for work, same, received, _ in begun:
        if work is not None:
            work.wait()
        begins = [0] * len(counts)
        for i in same:
            indices, values = [], []
            for rank, data in enumerate(received):
                count = counts[rank][i]
                of_indices, of_values = _byte_sizes(grads[i], count)
                middle = begins[rank] + of_indices
                end = middle + of_values
                indices.append(_from_bytes(data[begins[rank] : middle], grads[i]._indices(), count, dim=1))
                values.append(_from_bytes(data[middle:end], grads[i]._values(), count, dim=0))
                begins[rank] = end
            result[i] = torch.sparse_coo_tensor(
                torch.cat(indices, dim=1), torch.cat(values), grads[i].shape, is_coalesced=False, check_invariants=False
            )
    return result


def _byte_sizes(grad: Tensor, count: int) -> tuple[int, int]:
    """What indices and values of a gradient with `count` COO entries take, padding included."""
    of_value = math.prod(grad._values().shape[1:]) * grad._values().element_size()
    return _padded(8 * grad.sparse_dim() * count), _padded(of_value * count)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _to_bytes(part: Tensor) -> Tensor:
    flat = part.reshape(-1).contiguous().view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -len(flat) % _ALIGNMENT))


def _from_bytes(data: Tensor, like: Tensor, count: int, dim: int) -> Tensor:
    """`count` entries along `dim`, otherwise of the shape and dtype of `like`."""
    shape = [*like.shape[:dim], count, *like.shape[dim + 1 :]]
    return data[: math.prod(shape) * like.element_size()].view(like.dtype).view(shape)


# ---- Norms over processes that hold different parameters ------------------------------------------------------------


class NormGroup:
    """The processes over which the norm of all gradients is taken. Each of them has other parameters.

    Args:
        given (ProcessGroup or "world"): the process group. "world" means the default group at the time of the call.
    """

    def __init__(self, given: Any) -> None:
        if given != "world" and not (dist.is_available() and isinstance(given, dist.ProcessGroup)):
            raise TypeError(
                f'norm_group must be a process group, "world" or None, got {given!r} of type {type(given).__name__}'
            )
        self.given = given

    def __deepcopy__(self, memo: dict[int, Any]) -> "NormGroup":
        # Immutable, and a process group cannot be copied: an optimizer with one still can.
        return self

    @property
    def _group(self) -> "dist.ProcessGroup | None":
        return None if self.given == "world" else self.given

    def agree(
        self, iterations: int, has_gradient: bool, in_double: bool, global_clipnorm: float | None
    ) -> tuple[bool, bool]:
        """Returns whether any process has a gradient, and whether any has one whose norm is taken in float64.

        Raises:
            RuntimeError: if there is no process group; in every process, if they disagree on `iterations` or the norm.
        """
        _world_size(self._group, "norm_group")
        bits = struct.unpack("<q", struct.pack("<d", -1.0 if global_clipnorm is None else global_clipnorm))[0]
        rows = _gathered([iterations, has_gradient, in_double, bits], self._group, [])
        norms = [struct.unpack("<d", struct.pack("<q", row[3]))[0] for row in rows]
        for name, values in (
            ("iterations", [row[0] for row in rows]),
            ("global_clipnorm", [None if norm < 0 else norm for norm in norms]),
        ):
            if len(set(values)) > 1:
                ranks = dist.get_process_group_ranks(self._group)
                by_rank = ", ".join(f"process {rank}: {value}" for rank, value in zip(ranks, values, strict=True))
                raise RuntimeError(
                    f"the processes of norm_group disagree on {name} ({by_rank}). They must load the same checkpoint, "
                    "have the same options and step together"
                )
        return any(row[1] for row in rows), any(row[2] for row in rows)

    def sum(self, number: Tensor) -> Tensor:
        """Returns the sum of a number over the processes, with the same bits in each of them."""
        backends = dist.get_backend_config(self._group)
        device = number.device
        if f"{device.type}:" not in backends:
            device_type = backends.partition(":")[0]
            device = torch.device(device_type, torch.get_device_module(device_type).current_device())
        total = number.detach().to(device, copy=True)
        dist.all_reduce(total, group=self._group)
        return total.to(number.device)


# ---- Checks ---------------------------------------------------------------------------------------------------------


def _world_size(group: "dist.ProcessGroup | None", who: str = "all_reduce_sum") -> int:
    if not dist.is_available() or not dist.is_initialized():
        why = "is not initialized" if dist.is_available() else "is missing from this build of PyTorch"
        option = "gradient_aggregator" if who == "all_reduce_sum" else who
        raise RuntimeError(
            f"{who}: torch.distributed {why}. Call torch.distributed.init_process_group first, or leave "
            f"{option} out: one process has nothing to sum"
        )
    world_size = dist.get_world_size(group)
    if world_size < 1:
        raise RuntimeError(f"{who}: process {dist.get_rank()} is not in the group; only its members can sum over it")
    return world_size


def _check_gradient(position: int, grad: Any, backends: str) -> None:
    if not isinstance(grad, Tensor):
        raise TypeError(f"all_reduce_sum: gradient {position} is {grad!r} of type {type(grad).__name__}, not a Tensor")
    if type(grad) not in _PLAIN_TYPES:
        raise TypeError(
            f"all_reduce_sum: gradient {position} is a {type(grad).__name__}; only plain tensors can be summed here. "
            "FSDP and tensor parallelism have reduced their gradients already: leave gradient_aggregator out"
        )
    if grad.layout is not torch.strided and not is_sparse(grad):
        raise RuntimeError(
            f"all_reduce_sum: gradient {position} has layout {grad.layout}; only dense and torch.sparse_coo gradients "
            "can be summed. Use .to_sparse_coo()"
        )
    if grad.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"all_reduce_sum: gradient {position} requires grad, but autograd cannot record a sum over processes. "
            "Use .detach()"
        )
    if f"{grad.device.type}:" not in backends:
        raise RuntimeError(
            f"all_reduce_sum: gradient {position} is on {grad.device}, which the group's backends ({backends}) do not "
            "serve. Move it, or name a backend for each device: init_process_group('cpu:gloo,cuda:nccl')"
        )


def _fingerprint(grads: list[Tensor], bucket_bytes: int) -> tuple[int, int, int]:
    """The number of gradients and of elements, and a hash of all that decides what travels in which place.

    Devices count by the order in which they first appear: which GPU it is differs between processes.
    """
    ordinals: dict[torch.device, int] = {}
    text = [str(bucket_bytes)]
    for grad in grads:
        ordinal = ordinals.setdefault(grad.device, len(ordinals))
        sparse_dim = grad.sparse_dim() if is_sparse(grad) else ""
        text.append(f"{tuple(grad.shape)}{grad.dtype}{grad.device.type}{ordinal}{sparse_dim}")
    digest = hashlib.blake2b(" ".join(text).encode(), digest_size=8).digest()
    return len(grads), sum(grad.numel() for grad in grads), int.from_bytes(digest, "little", signed=True)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _gathered(row: list[int], group: "dist.ProcessGroup | None", grads: list[Tensor]) -> list[list[int]]:
    """The rows of all processes, which are of one length.

    A sum, not a gather, since that is the one call that every backend is known to have.
    """
    table = torch.zeros(dist.get_world_size(group), len(row), dtype=torch.int64)
    table[dist.get_rank(group)] = torch.tensor(row)
    backends = dist.get_backend_config(group)
    stream: Any = nullcontext()
    if "cpu:" not in backends:
        device_type = backends.partition(":")[0]
        device = torch.device(device_type, torch.get_device_module(device_type).current_device())
        device = next((grad.device for grad in grads if grad.device.type == device_type), device)
        if device_type == "cuda":
            # On the current stream the host would wait until the GPU has finished the backward pass.
            stream = torch.cuda.stream(_side_stream(device))
    else:
        device = torch.device("cpu")
    with stream:
        table = table.to(device)
        dist.all_reduce(table, group=group)
        rows: list[list[int]] = table.tolist()
    return rows


def _check_agreement(
    group: "dist.ProcessGroup | None", grads: list[Tensor], bucket_bytes: int, refusal: Exception | None
) -> None:
    """Raises RuntimeError in every process unless all have the same list; in one that refused its own, `refusal`.

    This runs at every call: if a process compared only a list that is new to it, it would wait for others whose list
    has not changed.
    """
    mine = (1, 0, 0, 0) if refusal is not None else (0, *_fingerprint(grads, bucket_bytes))
    rows = [tuple(row) for row in _gathered(list(mine), group, [] if refusal is not None else grads)]
    if refusal is not None:
        raise refusal
    ranks = dist.get_process_group_ranks(group)
    refused = [rank for rank, row in zip(ranks, rows, strict=True) if row[0]]
    if refused:
        raise RuntimeError(f"all_reduce_sum: {_processes(refused)} refused a gradient; the error there says why")
    if len(set(rows)) == 1:
        return
    alike: dict[tuple[int, ...], list[int]] = {}
    for rank, row in zip(ranks, rows, strict=True):
        alike.setdefault(row, []).append(rank)
    lists = "; ".join(
        f"{_processes(same)}: {count} with {elements} elements" for (_, count, elements, _), same in alike.items()
    )
    raise RuntimeError(
        f"all_reduce_sum: the processes have different lists of gradients ({lists}). All need the same shapes, dtypes, "
        "layouts and kinds of devices in the same order, and the same bucket_bytes. A parameter that a process did not "
        "use has no gradient there: give it one of zeros (param.grad = torch.zeros_like(param)), or leave "
        "gradient_aggregator out and let DistributedDataParallel(model, find_unused_parameters=True) reduce"
    )


def _processes(ranks: list[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


# ---- Who calls ------------------------------------------------------------------------------------------------------


def _frames() -> Iterator[FrameType]:
    """The calls that are running, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def check_norm_group(norm_group: NormGroup | None, options: dict[str, Any], is_made_by_zero: bool) -> None:
    """Raises ValueError if global_clipnorm is set under ZeroRedundancyOptimizer without a norm_group."""
    if is_made_by_zero and norm_group is None and options["global_clipnorm"] is not None:
        raise ValueError(
            f"global_clipnorm={options['global_clipnorm']!r} needs the gradients of all parameters, and under "
            "ZeroRedundancyOptimizer each process has those of its own parameters only. Pass "
            'norm_group="world", or the process group, to take the norm over all processes; or use clipnorm, which '
            "takes each gradient by itself"
        )


def is_made_by_zero() -> bool:
    """Whether a ZeroRedundancyOptimizer is constructing an optimizer for the parameters of this process right now."""
    # By the module of the callers, not by their locals: to look at those keeps them alive as long as the call runs.
    name = "torch.distributed.optim.zero_redundancy_optimizer"
    return name in sys.modules and any(frame.f_globals.get("__name__") == name for frame in _frames())


def is_called_to_make_state() -> bool:
    """Whether distributed checkpointing calls `step` with zero gradients, only to initialize the state that it loads
    into.
    """
    return any(
        frame.f_code.co_name == "_init_optim_state"
        and frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict"
        for frame in _frames()
    )
