"""What corresponds to what: the weights of Keras, and the parameters and buffers of PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from torch_adadelta.keras.layers import Layer, Variable
from torch_adadelta.keras.layouts import Layout, shape_of
from torch_adadelta.keras.modules import TorchLayer


class WeightTransfer(NamedTuple):
    """A weight of Keras, or a row of it, and the parameter or buffer that it goes to."""

    layer: Layer
    variable: Variable
    name: str  # of the parameter in the model
    tensor: Tensor
    layout: Layout
    row: int | None = None
    first: int | None = None

    @property
    def label(self) -> str:
        """The weight, for people."""
        return f"{self.layer.path}/{self.variable.role}" + ("" if self.row is None else f"[{self.row}]")

    @property
    def rows(self) -> tuple[int, int]:
        """The first row of the parameter, and that behind the last one, that the weight goes to."""
        shape = self.layout.result(shape_of(self.variable.value.shape, self.row))
        first = self.first or 0
        return first, first + (shape[0] if shape else 1)

    @property
    def part(self) -> str:
        """What of the parameter the weight goes to, for people."""
        return self.name if self.first is None else f"{self.name}[{self.rows[0]}:{self.rows[1]}]"


@dataclass
class Match:
    """All transfers, and what is left over on the side of PyTorch."""

    transfers: list[WeightTransfer]
    neutral: list[tuple[str, Tensor]] = field(default_factory=list)  # parameters that Keras does not have
    pairs: list[tuple[Layer, TorchLayer]] = field(default_factory=list)

    def by_tensor(self) -> list[list[WeightTransfer]]:
        """The transfers that go to each tensor, in the order of its rows."""
        found: dict[int, list[WeightTransfer]] = {}
        for transfer in self.transfers:
            found.setdefault(id(transfer.tensor), []).append(transfer)
        return [sorted(transfers, key=lambda transfer: transfer.rows) for transfers in found.values()]

    def check_parts(self) -> None:
        """Raises ValueError unless every tensor is given once, as a whole or in parts that cover it."""
        for transfers in self.by_tensor():
            tensor, name = transfers[0].tensor, transfers[0].name
            end = 0
            for before, transfer in zip([None, *transfers], transfers, strict=False):
                first, behind = transfer.rows
                if before is not None and first < end:
                    raise ValueError(
                        f"mapping has {before.label} for {before.part}, and {transfer.label} goes to {transfer.part}"
                    )
                if first > end:
                    raise ValueError(f"mapping has parts of {name}, and nothing for {name}[{end}:{first}]")
                end = behind
            count = len(tensor) if tensor.dim() else 1
            if end < count:
                raise ValueError(f"mapping has parts of {name}, and nothing for {name}[{end}:{count}]")


def overlap(ours: tuple[int, int], theirs: Sequence[tuple[int, int]]) -> bool:
    """Whether rows are among others."""
    return any(ours[0] < end and first < ours[1] for first, end in theirs)
