"""The optimizer's part of a train step in Keras 3's `fit`, on the torch backend: ours beside Keras' own.

Two equal models take turns, an epoch each; what is timed is `optimizer.apply`, as `fit` calls it. So the caches are as
a forward and a backward pass leave them.

    python benchmarks/keras3_fit.py [--rounds 5] [--threads 2]
"""

import argparse
import os
import statistics
import time
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch

from torch_adadelta import keras3

# One tensor of 16,777,216 elements; and 100 of 64 to 8, kernels and biases in turn.
LAYERS: dict[str, tuple[int, list[Any]]] = {
    "1x16M": (4096, [{"units": 4096, "use_bias": False}]),
    "100 small": (8, [{"units": 8} for _ in range(50)]),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight_decay": {"weight_decay": 1e-3},
    "clipnorm": {"clipnorm": 1.0},
    "global_clipnorm": {"global_clipnorm": 1.0},
    "use_ema": {"use_ema": True},
    "accumulation": {"gradient_accumulation_steps": 2},
}


def timed(optimizer: Any, width: int, layers: list[Any]) -> tuple[Any, list[float]]:
    """A model, and where the seconds of its optimizer's calls are added."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((width,)), *(keras.layers.Dense(**options) for options in layers)])
    seconds: list[float] = []
    apply = optimizer.apply

    def timed_apply(*arguments: Any) -> None:
        start = time.perf_counter()
        apply(*arguments)
        seconds.append(time.perf_counter() - start)

    optimizer.apply = timed_apply
    model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    return model, seconds


def measure(width: int, layers: list[Any], options: dict[str, Any], steps: int, rounds: int) -> list[float]:
    """The median seconds of a call: ours, and that of Keras."""
    pair = [timed(cls(1.0, **options), width, layers) for cls in (keras3.Adadelta, keras.optimizers.Adadelta)]
    x, y = (np.ones((2 * steps, units), "float32") for units in (width, layers[-1]["units"]))
    for turn in range(rounds + 1):
        for model, seconds in pair if turn % 2 else pair[::-1]:
            model.fit(x, y, batch_size=2, verbose=0)
            if turn == 0:
                seconds.clear()
    return [statistics.median(seconds) for _, seconds in pair]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"Keras {keras.__version__}, PyTorch {torch.__version__}, {arguments.threads} threads; optimizer.apply in fit"
    )
    for name, (width, layers) in LAYERS.items():
        steps = 4 if width > 1000 else 20
        for label, options in OPTIONS.items():
            ours, theirs = measure(width, layers, options, steps, arguments.rounds)
            figures = f"ours {1e3 * ours:9.3f} ms   Keras {1e3 * theirs:9.3f} ms   {theirs / ours:5.1f} ×"
            print(f"{name:10s} {label:16s} {figures}", flush=True)


if __name__ == "__main__":
    main()
