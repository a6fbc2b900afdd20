"""In which order features are that were feature maps: what the file, the modules and the user say of it."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import nn

from torch_adadelta.keras.axes import Axes
from torch_adadelta.keras.config import LayerConfig
from torch_adadelta.keras.contents import Checkpoint, damage_named
from torch_adadelta.keras.errors import KerasFileError
from torch_adadelta.keras.features import Flat
from torch_adadelta.keras.layers import Layer
from torch_adadelta.keras.layouts import (
    KEEP_ORDER,
    FeatureOrder,
    LayoutMismatch,
    interpretations,
    kinds_of,
    of_maps,
)
from torch_adadelta.keras.modules import TorchLayer

FLATTEN: Final = ("channels_first", "channels_last")


# The kinds of layers that take or give features that may be flattened maps, and those that make maps.
_TAKING: Final = ("dense", "layer_norm", "rms_norm", "lstm", "gru", "rnn", "attention")


_CONVOLUTIONS: Final = ("conv", "conv_transpose", "depthwise")


Word = str | int | None

# The sides of a layer.
_INPUTS, _OUTPUTS = 0, 1


class UnknownOrder(LayoutMismatch):
    """The order of features cannot be told, so that only a Layout for each weight says it.

    Args:
        message: why.
        example: how the features that the layer takes, and those that it gives, may be ordered anew.
    """

    def __init__(self, message: str, example: tuple[FeatureOrder, FeatureOrder] = (KEEP_ORDER, KEEP_ORDER)) -> None:
        super().__init__(message)
        self.example = example


class Flattening:
    """What the user says, and the modules show, of the order of flattened maps.

    Args:
        checkpoint: the side of Keras.
        given: "channels_first" or "channels_last"; or by the paths of layers one of these, or the number of channels of
            the maps that are flattened into its inputs, or a pair of either for its inputs and its outputs.
        has_maps: whether the model of PyTorch has modules for maps.

    Raises:
        ValueError: that is none of these, or no such layer is in the file.
        KerasFileError: the file says otherwise.
    """

    def __init__(self, checkpoint: Checkpoint, given: str | Mapping[str, Any] | None, has_maps: bool = False) -> None:
        model = checkpoint.model
        # The layers of which it is known where their features come from: not those in a custom layer.
        self._paths: set[str] = set()
        self._flats: tuple[dict[str, Flat], dict[str, Flat]] = {}, {}  # by `_INPUTS` and `_OUTPUTS`
        if model is not None and model.is_complete:
            self._paths.update(path for layer in model.layers for path in _paths_of(layer))
            with damage_named(checkpoint.path):
                axes = Axes(model, checkpoint.layers)
                self._flats = axes.inputs(), axes.outputs()
        self._maps = _channels_of_maps(checkpoint.layers)
        self._has_maps = has_maps or bool(self._maps[0])
        self._word = given if isinstance(given, str) else None
        self._words: dict[str, tuple[Word, Word]] = {}
        if isinstance(given, Mapping):
            self._words = {path: self._checked(path, value, checkpoint) for path, value in given.items()}
        elif given is not None and given not in FLATTEN:
            raise ValueError(f"flatten must be {' or '.join(map(repr, FLATTEN))}, or a dictionary, got {given!r}")

    def _checked(self, path: Any, value: Any, checkpoint: Checkpoint) -> tuple[Word, Word]:
        paths = [layer.path for layer in checkpoint.layers]
        if path not in paths:
            raise ValueError(f"flatten has {path!r}, which is no layer with weights; there are {', '.join(paths)}")
        words = tuple(value) if isinstance(value, list | tuple) else (value, value if value in FLATTEN else None)
        if len(words) != 2 or not all(word is None or word in FLATTEN or _is_count(word) for word in words):
            raise ValueError(
                f"flatten[{path!r}] must be {' or '.join(map(repr, FLATTEN))}, a number of channels, or a pair of "
                f"these for inputs and outputs; got {value!r}"
            )
        for word, flats, side in zip(words, self._flats, ("takes", "gives"), strict=True):
            if _is_count(word) and path in self._paths and path not in flats:
                raise KerasFileError(
                    f"{checkpoint.path}: flatten has {path!r}, and by the configuration it {side} no features that are "
                    "maps in one row"
                )
        return words

    def of(
        self, layer: Layer, torch_layer: TorchLayer | None = None, has_inputs: bool = True
    ) -> tuple[FeatureOrder, FeatureOrder]:
        """How the features that a layer takes, and those that it gives, are ordered anew.

        Args:
            layer: the layer.
            torch_layer: its module, if there is one.
            has_inputs: False if those that it takes do not matter.

        Raises:
            LayoutMismatch: that cannot be told.
        """
        words = self._words.get(layer.path, (self._word, self._word))
        for word, side in zip(words, (_INPUTS, _OUTPUTS), strict=True):
            self._check_count(layer, word, side)
        if layer.path not in self._paths:
            return self._unknown(layer, torch_layer, words)
        is_batch = torch_layer is not None and isinstance(torch_layer.module, nn.BatchNorm2d | nn.BatchNorm3d)
        found: list[FeatureOrder] = []
        problems: list[UnknownOrder] = []
        for word, side in zip(words, (_INPUTS, _OUTPUTS), strict=True):
            flat = self._flats[side].get(layer.path) if has_inputs or side == _OUTPUTS else None
            found.append(KEEP_ORDER)
            if flat is None or (is_batch and flat.channels < 0):  # whose features are no flattened maps
                continue
            is_shown = torch_layer is not None and (
                torch_layer.is_unflattened if flat.is_split else torch_layer.is_flattened
            )
            try:
                found[-1] = _ordered(layer, flat, word, is_shown)
            except UnknownOrder as error:
                problems.append(error)
                found[-1] = self._example(layer, side)
        if problems:
            raise UnknownOrder(str(problems[0]), (found[0], found[1]))
        return found[0], found[1]

    def _check_count(self, layer: Layer, word: Word, side: int) -> None:
        """Raises UnknownOrder if a number of channels that is given contradicts the file."""
        flat = self._flats[side].get(layer.path)
        counts = sorted(self._maps[side]) if flat is None else sorted(flat.by_channels) or [flat.channels]
        if not isinstance(word, int) or counts in ([], [-1]) or word in counts:
            return
        count = _features(layer, side)
        source = f"a {flat.why} has" if flat else "the convolutions in the file have"
        example = of_maps(word) if count % word == 0 else KEEP_ORDER
        raise UnknownOrder(
            f"{count} features are no maps of {word} channels: {source} {' or '.join(map(str, counts))}. If it is none "
            "of these, give the layer in mapping, its weights each with a Layout",
            (example, KEEP_ORDER) if side == _INPUTS else (KEEP_ORDER, example),
        )

    def _example(self, layer: Layer, side: int) -> FeatureOrder:
        """An order that features may have, where nothing tells: that of maps of a convolution in the file."""
        count = _features(layer, side)
        channels = [number for number in self._maps[side] if number > 1 and count % number == 0 and count > number]
        return of_maps(max(channels)) if channels else KEEP_ORDER

    def _unknown(
        self, layer: Layer, torch_layer: TorchLayer | None, words: tuple[Word, Word]
    ) -> tuple[FeatureOrder, FeatureOrder]:
        """The same where the file does not say what the layers do."""
        if self._words or self._word == "channels_last":
            first, second = (of_maps(word) if isinstance(word, int) else KEEP_ORDER for word in words)
            if "channels_first" in words:
                raise LayoutMismatch(
                    "the file does not say how many channels flattened maps have here; give their number"
                )
            return first, second
        kinds = (
            kinds_of(torch_layer.module)
            if torch_layer
            else [interpretation.kind for interpretation in interpretations(layer)]
        )
        is_vector = isinstance(torch_layer.module, nn.BatchNorm1d) if torch_layer else False
        if self._has_maps and (is_vector or not set(kinds).isdisjoint(_TAKING)):
            raise LayoutMismatch(
                "the file does not say whether flattened feature maps come in here, which PyTorch flattens in another "
                "order, or go out to a Reshape. Pass config=model.to_json(); or flatten='channels_last' if there are "
                f"none or the model flattens them as Keras does; or flatten={{{layer.path!r}: CHANNELS}} for layers "
                f"behind a flatten, and {{{layer.path!r}: (None, CHANNELS)}} for those before a reshape to maps"
            )
        return KEEP_ORDER, KEEP_ORDER


def _paths_of(known: LayerConfig) -> list[str]:
    """The layers that a layer of a configuration is: see `separated`."""
    if known.class_name.startswith("Separable"):
        return [f"{known.path}/depthwise", f"{known.path}/pointwise"]
    return [known.path]


def _features(layer: Layer, side: int) -> int:
    """How many features a layer takes, or gives, by its first weight."""
    shape = layer.variables[0].value.shape
    return shape[-1 if side == _OUTPUTS else 0]


def _is_count(word: Any) -> bool:
    return isinstance(word, int) and not isinstance(word, bool) and word > 0


def _ordered(layer: Layer, flat: Flat, word: Word, is_shown: bool) -> FeatureOrder:
    what = f"its features are a {flat.why}"
    if isinstance(word, int):
        return flat.by_channels.get(word) or flat.first or of_maps(word)
    if word == "channels_last":
        return flat.last
    if not flat.is_open:
        return KEEP_ORDER
    shown = flat.first if flat.is_split else flat.shown
    if is_shown and shown is not None:
        return shown
    if flat.first is None and flat.by_channels:
        raise LayoutMismatch(
            f"{what}, and nothing says which axis has the channels. Pass flatten={{{layer.path!r}: "
            f"{'(None, CHANNELS)' if flat.is_split else 'CHANNELS'}}} if PyTorch has them first, or "
            "flatten='channels_last' if the model keeps the order of Keras"
        )
    if flat.first is None:
        raise UnknownOrder(
            f"{what}, so their order cannot be told. Pass flatten='channels_last' if the model keeps the order of "
            "Keras, or give the layer in mapping, its weights each with a Layout"
        )
    if word == "channels_first":
        return flat.first
    raise LayoutMismatch(
        f"{what}, and PyTorch has the channels first. Pass flatten='channels_first' if the model flattens them so, or "
        "flatten='channels_last' if it permutes them to the order of Keras before"
    )


def _channels_of_maps(layers: Sequence[Layer]) -> tuple[set[int], set[int]]:
    """How many channels the maps of the convolutions of a file have, and those that they take."""
    given, taken = set(), set()
    for interpretation in (
        interpretation
        for layer in layers
        for interpretation in interpretations(layer)
        if interpretation.kind in _CONVOLUTIONS
    ):
        *_, inputs, outputs = interpretation.shapes["kernel"]
        if interpretation.kind == "conv_transpose":
            inputs, outputs = outputs, inputs
        given.add(inputs * outputs if interpretation.kind == "depthwise" else outputs)
        taken.add(inputs)
    return given | taken, taken
