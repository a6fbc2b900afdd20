"""The orders in which layers and modules are known to compute: where the output of each reaches the next."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from torch_adadelta.keras.config import Call, ModelConfig
from torch_adadelta.keras.contents import Checkpoint
from torch_adadelta.keras.layers import Layer
from torch_adadelta.keras.modules import TorchLayer


class Computation:
    """Which layers of a model depend on which.

    Args:
        checkpoint: what a file holds.
        layers: those of its layers that are asked for.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Sequence[Layer]) -> None:
        self._bits = {id(layer): 1 << number for number, layer in enumerate(layers)}
        self._before: dict[int, int] = {}  # by the `id` of a layer, the bits of the layers that it depends on
        model = checkpoint.model
        if model is None or not model.is_complete:
            return
        known, leaves = model.by_path(), checkpoint.leaves()
        own = [(layer, leaves[id(layer)]) for layer in layers if id(layer) in leaves]
        bits: dict[str, int] = {}
        for layer, leaf in own:
            is_chain = known[leaf].class_name.startswith("Separable")
            self._before[id(layer)] = bits.get(leaf, 0) if is_chain else 0
            bits[leaf] = bits.get(leaf, 0) | self._bits[id(layer)]
        dependencies = _dependencies(model, bits)
        for layer, leaf in own:
            for number in range(len(model.calls[leaf])):
                self._before[id(layer)] |= dependencies[Call(leaf, number)]

    def ordered(self, layers: Sequence[Layer]) -> list[Layer] | None:
        """Some of the layers, so that each depends on all before it, and on none behind it; None if that is not known.

        It is not where layers are in different branches, in one custom layer, or where the output of one comes back to
        an earlier one, as with a layer that is called at two places of a chain.
        """
        if any(id(layer) not in self._before for layer in layers):
            return None
        mask = sum(self._bits[id(layer)] for layer in layers)
        own = {id(layer): self._before[id(layer)] & mask & ~self._bits[id(layer)] for layer in layers}
        ranked = sorted(layers, key=lambda layer: own[id(layer)].bit_count())
        so_far = 0
        for layer in ranked:
            if own[id(layer)] != so_far:
                return None
            so_far |= self._bits[id(layer)]
        return ranked


def _dependencies(model: ModelConfig, bits: Mapping[str, int]) -> dict[Call, int]:
    """For each call of a layer, the bits of the layers that its inputs come through."""
    found: dict[Call, int] = {}
    for path, calls in model.calls.items():  # in which what a call takes comes before it
        for number, sources in enumerate(calls):
            own = 0
            for source in sources:
                own |= found.get(source, -1) | bits.get(source.path, 0)  # all, if two layers have one name
            found[Call(path, number)] = own
    return found


def run_in_order(torch_layers: Sequence[TorchLayer], model: nn.Module) -> bool:
    """Whether modules are known to run in the order of their definition: what they have in common is an nn.Sequential.

    They may lie deeper in different steps of it. Two layers of one recurrent module are in order, too.
    """
    modules = dict(model.named_modules())
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    if any(paths[id(torch_layer.module)] > 1 for torch_layer in torch_layers):
        return False
    return all(
        one.module is two.module
        or type(modules[_common(one.module_path, two.module_path)]).forward is nn.Sequential.forward
        for one, two in itertools.pairwise(torch_layers)
    )


def _common(path: str, other: str) -> str:
    """The path of the innermost module that two modules are in."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return ".".join(part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
