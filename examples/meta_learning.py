"""Learns the learning rates of Adadelta, one for each layer, by differentiating through its steps.

Tasks are sines of random amplitude and phase, of which a small net sees ten points and takes a few steps of Adadelta
from an initialisation that is learned too. The loss on other points of the sine is then differentiated through all
these steps, with `differentiable=True`, with respect to the initialisation and to the learning rates; torch.optim.Adam
follows these gradients. In the end the net fits a sine that it has never seen much better than from where it began.

    python examples/meta_learning.py [--steps 300] [--inner-steps 5] [--seed 0] [--device cuda] [--dtype float64]
"""

import argparse
import math
from collections.abc import Sequence

import common
import torch
from torch import Tensor, nn
from torch.func import functional_call

from torch_adadelta import AdadeltaKeras


def sine_tasks(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Points to adapt to and points to be judged by: x and y of each, [count, 10, 1]."""
    amplitude = torch.rand(count, 1, 1, generator=generator) * 4.9 + 0.1
    phase = torch.rand(count, 1, 1, generator=generator) * math.pi
    x = torch.rand(count, 20, 1, generator=generator) * 10 - 5
    y = amplitude * torch.sin(x + phase)
    return x[:, :10], y[:, :10], x[:, 10:], y[:, 10:]


def adapted(
    net: nn.Module, start: dict[str, Tensor], log_rates: dict[str, Tensor], x: Tensor, y: Tensor, steps: int
) -> dict[str, Tensor]:
    """The parameters after some steps of Adadelta from `start`, as a differentiable function of it and the rates."""
    params = {name: tensor.clone() for name, tensor in start.items()}  # not leaves: the steps write to them
    groups = [{"params": [param], "lr": log_rates[name].exp()} for name, param in params.items()]
    optimizer = AdadeltaKeras(groups, rho=0.9, epsilon=1e-3, differentiable=True)
    for _ in range(steps):
        # A step writes to the parameters, and autograd needs them as they were.
        current = {name: param.clone() for name, param in params.items()}
        loss = (functional_call(net, current, x) - y).square().mean()
        grads = torch.autograd.grad(loss, list(current.values()), create_graph=True)
        for param, grad in zip(params.values(), grads, strict=True):
            param.grad = grad
        optimizer.step()
    return params


def mean_loss(
    net: nn.Module,
    start: dict[str, Tensor],
    log_rates: dict[str, Tensor],
    tasks: tuple[Tensor, ...],
    steps: int,
) -> Tensor:
    losses = []
    for x, y, other_x, other_y in zip(*tasks, strict=True):
        params = adapted(net, start, log_rates, x, y, steps)
        losses.append((functional_call(net, params, other_x) - other_y).square().mean())
    return torch.stack(losses).mean()


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Returns the loss on unseen sines before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps of the outer loop")
    parser.add_argument("--inner-steps", type=int, default=5, help="steps of Adadelta for each task")
    parser.add_argument("--tasks", type=int, default=8, help="tasks in each step of the outer loop")
    parser.add_argument("--seed", type=int, default=0)
    common.add_device(
        parser, ("float32", "float64"), why="a derivative through several steps needs more than 16 bits", of="the net"
    )
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    net.to(args.device, args.dtype)
    start = {name: param.detach().clone().requires_grad_() for name, param in net.named_parameters()}
    like = {"device": args.device, "dtype": args.dtype}
    log_rates = {name: torch.tensor(math.log(0.1), requires_grad=True, **like) for name in start}

    def tasks(count: int) -> tuple[Tensor, ...]:
        return tuple(points.to(**like) for points in sine_tasks(count, generator))

    unseen = tasks(50)

    outer = torch.optim.Adam([*start.values(), *log_rates.values()], lr=5e-3)
    before = mean_loss(net, start, log_rates, unseen, args.inner_steps).item()
    for step in range(1, args.steps + 1):
        outer.zero_grad()
        loss = mean_loss(net, start, log_rates, tasks(args.tasks), args.inner_steps)
        loss.backward()
        outer.step()
        if step % max(1, args.steps // 10) == 0:
            print(f"step {step:4d}   loss after adapting {loss.item():.3f}")
    after = mean_loss(net, start, log_rates, unseen, args.inner_steps).item()

    print(f"\non sines never seen, after {args.inner_steps} steps of Adadelta: {before:.3f} before, {after:.3f} now")
    for name, log_rate in log_rates.items():
        print(f"learning rate of {name:10s} {log_rate.exp().item():.4f}")
    return before, after


if __name__ == "__main__":
    main()
