"""What the launches over a chunk of rows of the head share."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..row_selection import Rows
from ..row_softmax import LogitTransform


@dataclass(frozen=True)
class Chunk:
    """Rows of a batch on their way through the head.

    Attributes:
        hidden: Hidden states. Shape [N, H].
        weight: Shape [V, H].
        bias: Shape [V], or None.
        columns: Where each target stands; outside of [0, V) for a target of another slice. Shape
            [N].
        transform: Scale, cap and temperature of these rows.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    columns: Tensor
    transform: LogitTransform

    @property
    def has_cap(self) -> bool:
        """Whether the logits are capped."""
        return self.transform.softcap is not None

    @property
    def scale(self) -> float:
        """Factor before the cap."""
        return float(self.transform.logit_scale)

    @property
    def softcap(self) -> float:
        """Bound on the logits; any number without one."""
        return float(self.transform.softcap or 1.0)

    @property
    def temperature(self) -> tuple[Tensor, int]:
        """The temperature in memory, and the step from a row's to the next."""
        values = self.transform.temperature_tensor(self.hidden)
        return values, 0 if values.numel() == 1 else 1

    def new_rows(self) -> Tensor:
        """Memory for a number per row. Shape [N]."""
        return self.columns.new_empty(len(self.columns), dtype=torch.float32)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, of those that fill a multiprocessor."""
    if device.type == "cpu":  # the interpreter
        return 3
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def where(rows: Rows) -> tuple[int, Tensor | None]:
    """Where rows stand in a batch: the first of a stretch, or an index."""
    return (rows.start, None) if isinstance(rows, range) else (0, rows)


def contiguous(values: Tensor | None) -> Tensor | None:
    """Give each element memory of its own, in order."""
    return None if values is None else values.contiguous()
