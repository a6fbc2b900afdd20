"""Threads and processes: optimizers that share nothing do not disturb each other; after a fork; beside DataLoader."""

import multiprocessing
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Path, assert_same_bits, gradients
from torch import Tensor
from torch.nn import Parameter
from torch.utils.data import DataLoader, TensorDataset
from training import path as path

from torch_adadelta import AdadeltaKeras
from torch_adadelta.backends import kernels

STEPS = 21


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def trained(
    options: dict[str, bool], seed: int, sizes: tuple[int, ...] = (3, 40, 500), steps: int = STEPS
) -> list[Tensor]:
    """Parameters and state after some steps, each with gradients, clipping and state of its own."""
    params = [Parameter(torch.zeros(size)) for size in sizes]
    optimizer = AdadeltaKeras(params, 1.0, global_clipnorm=0.5 if seed % 2 else None, **options)
    grads = [gradients((size,), torch.float32, 1, seed)[0] for size in sizes]
    for step in range(steps):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad * (step % 7)
        if step == steps // 2:
            optimizer.load_state_dict(optimizer.state_dict())  # other state to cache
        optimizer.step()
    return [x.detach() for p in params for x in (p, *optimizer.state[p].values())]


def assert_equal(tensors: list[Tensor], expected: list[Tensor]) -> None:
    for tensor, wanted in zip(tensors, expected, strict=True):
        assert_same_bits(tensor, wanted)


def test_optimizers_in_several_threads(path: Path) -> None:
    """Three at once, beside a thread that never lets the interpreter's lock go by itself; switches come often."""
    expected = [trained(path.options, seed) for seed in range(3)]
    results: dict[int, list[Tensor]] = {}
    done = threading.Event()
    together = threading.Barrier(3)

    def train(seed: int) -> None:
        together.wait()
        results[seed] = trained(path.options, seed)

    def keep_busy() -> None:
        while not done.is_set():
            sum(range(100))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    busy = threading.Thread(target=keep_busy)
    threads = [threading.Thread(target=train, args=(seed,)) for seed in range(3)]
    try:
        busy.start()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        done.set()
        busy.join()
        sys.setswitchinterval(interval)
    for seed, wanted in enumerate(expected):
        assert_equal(results[seed], wanted)


def _train_into(connection: Any, options: dict[str, bool]) -> None:
    torch.set_num_threads(1)  # OpenMP's threads did not come along
    connection.send([x.numpy() for x in trained(options, 1, (3, 100_000), 6)])
    connection.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_after_use_goes_on_with_one_thread(path: Path) -> None:
    """As in a worker of DataLoader, or a server that forks."""
    torch.set_num_threads(2)
    expected = trained(path.options, 1, (3, 100_000), 6)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_train_into, args=(theirs, path.options), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(120), "the child hangs"
        result = ours.recv()
    finally:
        process.kill()
        process.join()
    assert_equal([torch.from_numpy(x) for x in result], expected)
    assert_equal(trained(path.options, 1, (3, 100_000), 6), expected)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning", "ignore:This DataLoader will create")
def test_workers_of_a_data_loader_change_nothing(path: Path) -> None:
    """They are forked anew in every epoch, amid the training."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 4), torch.randn(24, 1))

    def train(workers: int) -> list[Tensor]:
        torch.manual_seed(1)
        model = torch.nn.Linear(4, 1)
        optimizer = AdadeltaKeras(model.parameters(), 1.0, **path.options)
        for _ in range(2):
            for inputs, targets in DataLoader(data, batch_size=8, num_workers=workers):
                optimizer.zero_grad()
                (model(inputs) - targets).square().mean().backward()
                optimizer.step()
        return [x.detach() for p in model.parameters() for x in (p, *optimizer.state[p].values())]

    assert_equal(train(2), train(0))


@pytest.mark.skipif(not kernels.is_loaded, reason="the compiled library is not installed")
def test_lists_may_be_emptied_while_an_update_runs() -> None:
    """By another thread: what the update works on stays alive."""
    code = """
        from concurrent.futures import ThreadPoolExecutor
        import torch
        from torch_adadelta.backends import kernels
        from torch_adadelta.backends.batch import Segment

        numel = 2**25
        square_avgs, acc_deltas = [torch.zeros(numel)], [torch.zeros(numel)]
        state = kernels.AccumulatorCache(square_avgs, acc_deltas)
        update_op = torch.ops.torch_adadelta.adadelta_.cached
        with ThreadPoolExecutor(1) as executor:
            for _ in range(5):
                before = square_avgs[0][0].clone()
                params, grads = [torch.ones(numel)], [torch.ones(numel)]
                segment = kernels.hyperparameter_arguments([Segment(1, 1.0, 0.95, 1e-7)])
                update = executor.submit(update_op, params, grads, state.number, *segment)
                while not update.done() and square_avgs[0][0] == before:
                    pass  # until it has begun to write
                params.clear()
                grads.clear()
                update.result()
        assert square_avgs[0].min() == square_avgs[0].max() > 0
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
