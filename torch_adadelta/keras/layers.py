"""A layer of Keras and its weights, as a file holds them."""

from dataclasses import dataclass, field
from typing import Any, Final

from torch_adadelta.keras.errors import LazyArray
from torch_adadelta.step import accumulation, averages

ACCUMULATORS: Final = ("square_avg", "acc_delta")

# All state that there may be of a weight, by its keys in PyTorch. What comes behind the accumulators needs an option.
SLOTS: Final = (*ACCUMULATORS, averages.KEY, accumulation.KEY)


@dataclass
class Variable:
    """A weight, and its state if the optimizer has some for it."""

    role: str  # what it is in its layer: "kernel", "forward/bias", "query/kernel"; "0", "1", … if that is not known
    value: LazyArray
    square_avg: LazyArray | None = None
    acc_delta: LazyArray | None = None
    average: LazyArray | None = None
    gradient_accumulator: LazyArray | None = None
    is_frozen: bool = False  # whether the configuration says that it is not trained, though there may be state for it

    @property
    def has_state(self) -> bool:
        """Whether the optimizer trained it."""
        return self.square_avg is not None

    @property
    def slots(self) -> list[str]:
        """The state that there is of it."""
        return [slot for slot in SLOTS if getattr(self, slot) is not None]


@dataclass
class Layer:
    """A layer with weights."""

    path: str  # "dense_1", or "encoder/dense_1" in a nested model
    class_name: str | None
    config: dict[str, Any] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    group: str = ""  # where a file of numbered weights has it: "layers/functional/layers/dense"
    is_known: bool = False  # there: whether it is known which weights it has, and in which order

    @property
    def is_frozen(self) -> bool:
        """Whether the configuration says that it is not trained."""
        return any(variable.is_frozen for variable in self.variables)

    def __str__(self) -> str:
        shapes = ", ".join(f"{variable.role} {variable.value.shape}" for variable in self.variables)
        return f"{self.path} ({self.class_name or 'class unknown'}): {shapes}"
