"""What the launches over a chunk of rows of the head share."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..row_selection import Rows
from ..row_softmax import LogitTransform
from ..row_statistics import RowStatistics


@dataclass(frozen=True)
class Chunk:
    """Rows of a batch on their way through the head.

    Attributes:
        hidden: Hidden states, contiguous. Shape [N, H].
        weight: Shape [V, H].
        bias: Shape [V], or None.
        columns: Where each target stands; outside of [0, V) for a target of another slice. Shape
            [N].
        transform: Scale, cap and temperature of these rows, the last in memory.
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
    def to_logits(self) -> tuple[float, float | None, Tensor, int]:
        """Kernel arguments: scale, softcap, temperature_ptr, temperature_stride."""
        temperature, cap = self.transform.temperature, self.transform.softcap
        assert isinstance(temperature, Tensor)
        step = 0 if temperature.numel() == 1 else 1
        return self.transform.logit_scale, None if cap is None else float(cap), temperature, step

    @property
    def of_rows(self) -> tuple[Any, ...]:
        """Kernel arguments: x_ptr, x_stride, targets_ptr, vocabulary, width, and `to_logits`."""
        return *rows_of(self.hidden), self.columns, *self.weight.shape, *self.to_logits

    @property
    def of_weight(self) -> tuple[Any, ...]:
        """Kernel arguments: w_ptr, w_stride, w_step, bias_ptr."""
        return self.weight, *self.weight.stride(), self.bias

    def new_rows(self) -> Tensor:
        """Memory for a number per row. Shape [N]."""
        return self.columns.new_empty(len(self.columns), dtype=torch.float32)

    def new_statistics(self, *, entropy: bool) -> RowStatistics:
        """Memory for what the softmax leaves of each row."""
        logprobs, reference, total = (self.new_rows() for _ in range(3))
        return RowStatistics(logprobs, self.new_rows() if entropy else None, reference, total)


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


def rows_of(values: Tensor | None) -> tuple[Tensor | None, int]:
    """Kernel arguments: a matrix that may be missing, and the step from a row to the next."""
    return values, 0 if values is None else values.stride(0)


def contiguous(values: Tensor | None) -> Tensor | None:
    """Give each element memory of its own, in order."""
    return None if values is None else values.contiguous()
