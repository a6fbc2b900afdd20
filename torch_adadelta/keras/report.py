"""What `load_keras` and `save_keras` tell of what they did."""

from dataclasses import dataclass, field
from typing import Any

from torch_adadelta import schedules


@dataclass
class Report:
    """What `load_keras` or `save_keras` moved. ``str(report)`` is a table.

    Attributes:
        source (str): the path and the kind of the file.
        iterations (int): the number of updates.
        hyperparameters (dict): the hyperparameters that were set or written.
        moves (list): a tuple (weight, parameter, layout, whether there is state) for each weight.
        notes (list): differences between the two models, and what was not in the file or not moved.
        norm_variables (list): a tuple (weight, pieces) for each weight that is not one parameter.
    """

    source: str
    iterations: int
    hyperparameters: dict[str, Any]  # those that were set, or written
    moves: list[tuple[str, str, str, bool]]  # the weight, the parameter, how it is turned, whether there is state
    notes: list[str] = field(default_factory=list)  # what differs, or was not in the file
    norm_variables: list[tuple[str, str]] = field(default_factory=list)  # weights not one to one with parameters

    def __str__(self) -> str:
        rows = [("Keras", "PyTorch", "layout", "state")]
        rows += [(*move[:3], "yes" if move[3] else "no") for move in self.moves]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [self.source, f"iterations: {self.iterations}"]
        lines += [f"{name}: {text_of(value)}" for name, value in self.hyperparameters.items()]
        if self.norm_variables:
            lines += ["norm_variables:", *(f"  {weight} → {pieces}" for weight, pieces in self.norm_variables)]
        lines.append("")
        for row in rows:
            lines.append("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]))
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(line.rstrip() for line in lines)


def text_of(value: Any) -> str:
    return (
        f"{type(value).__name__} {value.get_config()}"
        if isinstance(value, schedules.LearningRateSchedule)
        else repr(value)
    )
