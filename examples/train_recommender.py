"""Trains a recommender on a table of embeddings twice: with sparse gradients, and with dense ones.

Matrix factorisation: a person u rates an item i with mean + b_u + b_i + <p_u, q_i>, where the bias b and the vector of
everybody and everything are a row of one large table, in which ids find their rows by a hash, as they do in services
that do not know all ids beforehand. The ratings are the 1797 handwritten digits of 8x8 pixels that come with
scikit-learn, so nothing is downloaded: an image is a person, a pixel is an item, and its darkness, 0 to 16, is the
rating. A fifth of the ratings is hidden, and to be predicted.

With `sparse=True` in `nn.Embedding`, a step of AdadeltaKeras costs what the batch touches; without, it costs what the
table holds. The losses differ, too: a dense gradient lets the accumulators of rows that are not in the batch decay.

It prints error and time, and draws both to output/train_recommender.png. On one machine, the seed determines the
errors. Run it, where torch_adadelta is installed with its extra "examples", with

    python examples/train_recommender.py [--device cuda] [--dtype bfloat16]
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import common
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from torch_adadelta import AdadeltaKeras

PEOPLE: Final = 1797
ITEMS: Final = 64

# With more than the 1e-7 of Keras, Adadelta gets going sooner: its first steps are of the order of the root.
EPSILON: Final = 1e-4

# Of the prediction on hidden ratings, as a share of the error that the mean rating of each item makes.
REQUIRED_SHARE: Final = 0.75

_COLOURS: Final = {"sparse": common.RED, "dense": common.BLUE}


class Ratings(NamedTuple):
    """Of each rating the person, the item and the value, all of shape (n,)."""

    people: Tensor
    items: Tensor
    values: Tensor


class Data(NamedTuple):
    """Ratings to learn from, and hidden ones."""

    train: Ratings
    hidden: Ratings

    def error_of_means(self) -> float:
        """The root mean square error of predicting the mean rating of each item."""
        values = self.train.values.double()
        sums = values.new_zeros(ITEMS).index_add_(0, self.train.items, values)
        means = sums / torch.bincount(self.train.items, minlength=ITEMS)
        return float((means[self.hidden.items] - self.hidden.values).square().mean().sqrt())


class Run(NamedTuple):
    """What came of one kind of gradient."""

    errors: list[float]  # root mean square, on the hidden ratings, before training and after each epoch
    seconds: list[float]  # of training, until then
    step_us: float  # the median time in step(), in microseconds
    batch_us: float  # of a whole batch: forward, backward and step


class Result(NamedTuple):
    """What came of both kinds."""

    sparse: Run
    dense: Run
    error_of_means: float


class Recommender(nn.Module):
    """One table for people and items: the first column is the bias."""

    def __init__(self, rows: int, width: int, mean: float, *, is_sparse: bool) -> None:
        super().__init__()
        self.mean = mean
        self.table = nn.Embedding(rows, 1 + width, sparse=is_sparse)
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, people: Tensor, items: Tensor) -> Tensor:
        """The ratings that are expected."""
        p = self.table(self._row(people))
        q = self.table(self._row(PEOPLE + items))
        return self.mean + p[:, 0] + q[:, 0] + (p[:, 1:] * q[:, 1:]).sum(1)

    def _row(self, ids: Tensor) -> Tensor:
        return (ids * 2654435761) % self.table.num_embeddings  # Knuth's multiplicative hash


def load(device: torch.device, dtype: torch.dtype) -> Data:
    """The ratings, a fifth of them hidden, always the same."""
    images, _ = load_digits(return_X_y=True)
    values = torch.as_tensor(images, dtype=dtype, device=device).reshape(-1)
    numbers = torch.randperm(len(values), generator=torch.Generator().manual_seed(common.SPLIT_SEED)).to(device)
    cut = len(numbers) // 5

    def ratings(numbers: Tensor) -> Ratings:
        return Ratings(numbers // ITEMS, numbers % ITEMS, values[numbers])

    return Data(ratings(numbers[cut:]), ratings(numbers[:cut]))


@torch.no_grad()
def error(model: Recommender, ratings: Ratings) -> float:
    """The root mean square error of a model's predictions."""
    return float((model(ratings.people, ratings.items) - ratings.values).double().square().mean().sqrt())


def train(
    data: Data, *, is_sparse: bool, rows: int, width: int, epochs: int, batch_size: int, seed: int, progress: Progress
) -> Run:
    """Trains one recommender."""
    torch.manual_seed(seed)
    device, dtype = data.train.values.device, data.train.values.dtype
    mean = data.train.values.double().mean().item()
    model = Recommender(rows, width, mean, is_sparse=is_sparse).to(device, dtype)
    optimizer = AdadeltaKeras(model.parameters(), learning_rate=1.0, epsilon=EPSILON)
    errors, seconds, spent = [error(model, data.hidden)], [0.0], 0.0
    step_ns: list[int] = []
    batch_ns: list[int] = []
    name = "sparse" if is_sparse else "dense"
    for _ in progress.track(range(epochs), description=f"{name} gradients"):
        for batch in torch.randperm(len(data.train.values)).to(device).split(batch_size):
            people, items, values = (column[batch] for column in data.train)
            common.synchronize(device)
            start = time.perf_counter_ns()
            optimizer.zero_grad()
            (model(people, items) - values).square().mean().backward()
            common.synchronize(device)
            before_step = time.perf_counter_ns()
            optimizer.step()
            common.synchronize(device)
            end = time.perf_counter_ns()
            step_ns.append(end - before_step)
            batch_ns.append(end - start)
            spent += (end - start) / 1e9
        errors.append(error(model, data.hidden))
        seconds.append(spent)
    return Run(errors, seconds, statistics.median(step_ns) / 1000, statistics.median(batch_ns) / 1000)


def plot(result: Result, rows: int, path: Path) -> None:
    """Draws the error on hidden ratings against epochs and against time."""
    figure = common.new_figure(10, 4.5)
    by_epoch, by_time = figure.subplots(1, 2, sharey=True)
    for name, colour in _COLOURS.items():
        run: Run = getattr(result, name)
        label = f"{name} gradients: step {_duration(run.step_us)}"
        by_epoch.plot(range(len(run.errors)), run.errors, color=colour, marker="o", markersize=4, label=label)
        by_time.plot(run.seconds[1:], run.errors[1:], color=colour, marker="o", markersize=4, label=label)
    for axes in (by_epoch, by_time):
        axes.axhline(result.error_of_means, color="#666666", linestyle="--", linewidth=1, label="mean of each item")
    by_epoch.set_ylabel("root mean square error on hidden ratings")
    by_epoch.set_xlabel("epochs")
    by_time.set_xlabel("seconds of training (logarithmic)")
    by_time.set_xscale("log")
    by_epoch.legend()
    figure.suptitle(f"Matrix factorisation with a table of {rows:,} rows, same initial values and batches")
    common.save(figure, path)


def _duration(microseconds: float) -> str:
    return f"{microseconds / 1000:.1f} ms" if microseconds >= 1000 else f"{microseconds:.0f} µs"


def report(result: Result) -> None:
    """Prints error and time of both kinds of gradient side by side."""
    table = Table()
    table.add_column("gradients", no_wrap=True)
    for heading in ("error on hidden ratings", "median step()", "median batch", "training"):
        table.add_column(heading, justify="right")
    for name in _COLOURS:
        run: Run = getattr(result, name)
        cells = (f"{run.errors[-1]:.3f}", _duration(run.step_us), _duration(run.batch_us), f"{run.seconds[-1]:.1f} s")
        table.add_row(name, *cells)
    Console().print(table)
    print(f"The mean rating of each item: {result.error_of_means:.3f}.")


def main(arguments: Sequence[str] | None = None) -> Result:
    """Runs the example as the command line says, and returns what came of it."""
    parser = common.parser(
        "Train a recommender on a large table of embeddings, with sparse and with dense gradients.",
        epochs=12,
        batch_size=512,
        data="ratings",
    )
    common.add_device(
        parser,
        ("float32", "float64", "bfloat16"),
        why="PyTorch does not add up sparse gradients of float16 on the CPU",
        of="the model and the ratings",
    )
    parser.add_argument("--rows", type=common.at_least(1), default=2**18, help="of the table")
    parser.add_argument("--width", type=common.at_least(1), default=15, help="of the vectors, without the bias")
    parser.add_argument("--output", type=common.picture, default="output/train_recommender.png", help="the picture")
    options = parser.parse_args(arguments)

    data = load(options.device, options.dtype)
    with Progress() as progress:
        sparse, dense = (
            train(
                data,
                is_sparse=is_sparse,
                rows=options.rows,
                width=options.width,
                epochs=options.epochs,
                batch_size=options.batch_size,
                seed=options.seed,
                progress=progress,
            )
            for is_sparse in (True, False)
        )
    result = Result(sparse, dense, data.error_of_means())
    report(result)
    plot(result, options.rows, options.output)
    return result


if __name__ == "__main__":
    result = main()
    share = result.sparse.errors[-1] / result.error_of_means
    if share > REQUIRED_SHARE:
        sys.exit(
            f"With sparse gradients the error is {share:.0%} of that of the means, above the {REQUIRED_SHARE:.0%} "
            "required. With other options than the defaults, more epochs may help."
        )
