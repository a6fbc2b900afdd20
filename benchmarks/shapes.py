"""The shapes of the parameters of published models, in the order of their layers, for optimizers to work on.

They follow from the papers and stand here so that nothing has to be downloaded. The totals are the known ones:
ResNet-50 has 25,557,032 parameters, ViT-B/16 86,567,656, GPT-2 small 124,439,808 (its output layer is the embedding).
"""

from collections.abc import Iterable
from math import prod

Shape = tuple[int, ...]


def count(shapes: Iterable[Shape]) -> int:
    """The number of elements of all tensors."""
    return sum(map(prod, shapes))


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def resnet50() -> list[Shape]:
    """The 161 parameters of a ResNet-50 for 1000 classes (He et al., 2015)."""
    shapes: list[Shape] = []

    def add_convolution(inputs: int, outputs: int, kernel: int) -> None:
        shapes.extend([(outputs, inputs, kernel, kernel), *_norm(outputs)])

    add_convolution(3, 64, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            add_convolution(channels, width, 1)
            add_convolution(width, width, 3)
            add_convolution(width, 4 * width, 1)
            if block == 0:
                add_convolution(channels, 4 * width, 1)  # the shortcut
            channels = 4 * width
    return [*shapes, *_linear(channels, 1000)]


def _transformer(width: int, layers: int) -> list[Shape]:
    """Blocks of attention and of two linear layers, and a last normalization."""
    attention = _norm(width) + _linear(width, 3 * width) + _linear(width, width)
    return (attention + _norm(width) + _linear(width, 4 * width) + _linear(4 * width, width)) * layers + _norm(width)


def vit_b16() -> list[Shape]:
    """The 152 parameters of a ViT-B/16 for images of 224 x 224 and 1000 classes (Dosovitskiy et al., 2020)."""
    width, patches = 768, (224 // 16) ** 2
    embedding: list[Shape] = [(1, 1, width), (1, patches + 1, width), (width, 3, 16, 16), (width,)]
    return [*embedding, *_transformer(width, 12), *_linear(width, 1000)]


def gpt2_small() -> list[Shape]:
    """The 148 parameters of the smallest GPT-2 (Radford et al., 2019)."""
    return [(50257, 768), (1024, 768), *_transformer(768, 12)]


def embedding(rows: int) -> list[Shape]:
    """A table of vectors of length 16, and the two layers that score a pair of them: a small recommender."""
    return [(rows, 16), *_linear(32, 64), *_linear(64, 1)]
