"""A real training job on CUDA: a convolutional net on handwritten digits, plain, under autocast, and in a graph."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import assert_same_bits
from torch import Tensor, nn
from torch.nn import Parameter

from torch_adadelta import AdadeltaKeras

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

EPOCHS, BATCH = 12, 32
REQUIRED_ACCURACY = 0.95


class Job:
    """Model and data on the device, and a copy of the parameters on the CPU that gets the same gradients."""

    def __init__(self, **options: Any) -> None:
        datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn, which has the digits")
        images, labels = datasets.load_digits(return_X_y=True)
        x = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        y = torch.as_tensor(labels)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(x), generator=generator)
        x, y = x[order].cuda(), y[order].cuda()
        self.generator = generator
        self.train_set, self.test_set = (x[450:], y[450:]), (x[:450], y[:450])
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        ).to("cuda", memory_format=torch.channels_last)
        self.params = list(self.model.parameters())
        self.optimizer = AdadeltaKeras(self.params, 1.0, fused=True, **options)
        self.cpu_params = [Parameter(p.detach().cpu()) for p in self.params]
        self.cpu_optimizer = AdadeltaKeras(self.cpu_params, 1.0, **{**options, "capturable": False})

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(images), labels)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All of one size, in a new order every epoch."""
        images, labels = self.train_set
        for _ in range(EPOCHS):
            order = torch.randperm(len(images), generator=self.generator)
            for indices in order[: len(images) // BATCH * BATCH].cuda().split(BATCH):
                yield images[indices], labels[indices]

    def follow(self, scale: float = 1.0) -> None:
        """The step on the CPU with the gradients that the device has."""
        for p, q in zip(self.cpu_params, self.params, strict=True):
            assert q.grad is not None
            p.grad = q.grad.cpu() / scale
        self.cpu_optimizer.step()

    def assert_trained(self) -> None:
        assert self.optimizer.iterations == self.cpu_optimizer.iterations
        for index, (p, q) in enumerate(zip(self.cpu_params, self.params, strict=True)):
            assert_same_bits(q.cpu(), p, f"parameter {index}")
            for name, value in self.cpu_optimizer.state[p].items():
                assert_same_bits(self.optimizer.state[q][name].cpu(), value, f"{name} of parameter {index}")
        images, labels = self.test_set
        with torch.no_grad():
            accuracy = float((self.model(images).argmax(dim=1) == labels).double().mean())
        assert accuracy > REQUIRED_ACCURACY


OPTIONS: tuple[dict[str, float], ...] = ({}, {"clipnorm": 1.0}, {"global_clipnorm": 1.0})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain(options: dict[str, float]) -> None:
    job = Job(**options)
    for images, labels in job.batches():
        job.optimizer.zero_grad()
        job.loss(images, labels).backward()
        job.optimizer.step()
        job.follow()
    job.assert_trained()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_autocast_with_grad_scaler(options: dict[str, float]) -> None:
    """A scale so large that the first steps are skipped."""
    job = Job(**options)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24, growth_interval=100)
    skipped = 0
    for images, labels in job.batches():
        job.optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = job.loss(images, labels)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        is_finite = all(bool(p.grad.isfinite().all()) for p in job.params if p.grad is not None)
        scaler.step(job.optimizer)
        scaler.update()
        if is_finite:
            job.follow(scale)
        skipped += not is_finite
    assert skipped > 0
    job.assert_trained()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_captured_graph(options: dict[str, float]) -> None:
    """Forward, backward and step in one graph."""
    job = Job(capturable=True, **options)
    batches = job.batches()
    images, labels = (x.clone() for x in next(batches))

    def train_step() -> None:
        job.optimizer.zero_grad(set_to_none=False)
        job.loss(images, labels).backward()
        job.optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train_step()
            job.follow()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step()
    for new_images, new_labels in batches:
        images.copy_(new_images)
        labels.copy_(new_labels)
        graph.replay()
        job.follow()
    job.assert_trained()
