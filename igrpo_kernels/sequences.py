"""One view of both layouts: padded [B, T], and packed [L] with `cu_seqlens` [B + 1].

Losses are written once against `Sequences`, which knows which tokens count, which sequence each
belongs to, and how to move between one value per token and one value per sequence. Masked slots
are selected away before any arithmetic, so they may hold anything, NaN and inf included.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_integral, check_mask, check_rank, describe
from .row_selection import Rows, take


@dataclass(frozen=True)
class Sequences:
    """Which tokens count, and which sequence each belongs to.

    Attributes:
        mask: True where a token counts. Shape [B, T], or [L] when packed.
        count: B, the number of sequences; those without a counted token are among them.
        owner: Packed only: index of the sequence that each token belongs to. Shape [L].
        complete: Every token counts, so that nothing has to be selected.

    Examples:
        >>> sequences = Sequences.of(torch.zeros(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]]))
        >>> sequences.mean(torch.tensor([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0]]))
        tensor([2., 5.])
    """

    mask: Tensor
    count: int
    owner: Tensor | None = None
    complete: bool = False

    @classmethod
    def of(
        cls,
        values: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        name: str = "logprobs",
    ) -> "Sequences":
        """Read the layout off a tensor of one value per token.

        Args:
            values: One value per token. Shape [B, T], or [L] with `cu_seqlens`.
            mask: 1 (or True) where a token counts; None counts every token. Shape of `values`.
            cu_seqlens: Packed only: offsets 0 = c[0] <= c[1] <= ... <= c[B] = L. Shape [B + 1].
            name: What errors call `values`.

        Raises:
            TypeError: `mask` is not a tensor, or `cu_seqlens` is not of integers.
            ValueError: The shapes do not fit each other, or `cu_seqlens` does not rise from 0 to
                L (looked at on the CPU alone: on a GPU it would cost a synchronization).
        """
        complete = mask is None
        if mask is None:
            mask = torch.ones_like(values, dtype=torch.bool)
        else:
            mask = check_mask(mask, values.shape, f"of {name}").to(values.device)
        if cu_seqlens is None:
            if values.dim() != 2:
                raise ValueError(
                    f"{name} must have shape [B, T], or [L] with cu_seqlens, got {describe(values)}"
                )
            return cls(mask, values.shape[0], complete=complete)
        check_rank(name, values, 1, "[L] where cu_seqlens is given")
        check_rank("cu_seqlens", check_integral("cu_seqlens", cu_seqlens), 1, "[B + 1]")
        if cu_seqlens.numel() == 0:
            raise ValueError("cu_seqlens must have shape [B + 1], got [0]")
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_offsets(cu_seqlens, values.numel())
        count = cu_seqlens.numel() - 1
        owner = torch.repeat_interleave(
            torch.arange(count, device=values.device),
            cu_seqlens.to(values.device).diff(),
            output_size=values.numel(),
        )
        return cls(mask, count, owner, complete)

    @property
    def lengths(self) -> Tensor:
        """Counted tokens of each sequence. Shape [B], in int64."""
        if self.owner is None:
            return self.mask.sum(-1)
        return self.owner.new_zeros(self.count).index_add_(0, self.owner, self.mask.long())

    @property
    def owners(self) -> Tensor:
        """Index of the sequence that each token belongs to. Shape of the tokens."""
        if self.owner is not None:
            return self.owner
        rows = torch.arange(self.count, device=self.mask.device)
        return rows[:, None].expand(self.mask.shape)

    def select(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Replace what stands in masked slots by `fill`; its gradient is exactly zero."""
        if self.complete:
            whole = values.shape[-self.mask.dim() :] == self.mask.shape
            return values if whole else values.expand_as(self.mask)
        return torch.where(self.mask, values, fill)

    def sum(self, values: Tensor) -> Tensor:
        """Sum the counted tokens of each sequence. Shape [B]."""
        values = self.select(values)
        if self.owner is None:
            return values.sum(-1)
        return values.new_zeros(self.count).index_add(0, self.owner, values)

    def mean(self, values: Tensor) -> Tensor:
        """Average the counted tokens of each sequence; zero where there are none. Shape [B]."""
        return self.sum(values) / self.lengths.clamp(min=1)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """Give each token its sequence's value. Shape [B] to [B, 1] (broadcasts), or [L]."""
        return per_sequence[:, None] if self.owner is None else per_sequence[self.owner]

    def align(self, name: str, values: Tensor) -> Tensor:
        """Bring one value per token, or one per sequence, to a shape that broadcasts to the tokens.

        Shape [B, T], [B] or [B, 1] to [B, T] or [B, 1]; packed, [L], [B] or [B, 1] to [L]. Where
        L = B the values are taken as one per sequence.
        """
        if values.shape in ((self.count,), (self.count, 1)):
            return self.spread(values.reshape(self.count))
        if values.shape == self.mask.shape:
            return values
        layout = "[B, T]" if self.owner is None else "[L]"
        raise ValueError(
            f"{name} must have shape {layout} = {list(self.mask.shape)} or [B] = [{self.count}], "
            f"got {list(values.shape)}"
        )

    def select_aligned(self, values: Tensor) -> Tensor:
        """Put 0 in masked slots, and where a sequence has no token that counts."""
        if values.shape == self.mask.shape:
            return self.select(values)
        return values if self.complete else torch.where(self.spread(self.lengths > 0), values, 0.0)

    def take(self, rows: Rows) -> "Sequences":
        """Select tokens that count, by their index among all tokens; they become packed."""
        mask = self.mask.new_ones(len(rows))
        if self.owner is not None:
            owner = take(self.owner, rows)
        else:
            if isinstance(rows, range):
                rows = torch.arange(rows.start, rows.stop, device=mask.device)
            owner = rows // max(1, self.mask.shape[1])
        return Sequences(mask, self.count, owner, complete=True)

    def pick(self, values: Tensor, rows: Rows, owner: Tensor) -> Tensor:
        """Select tokens of values that broadcast to them. Shape [N], or [] as it is."""
        if values.shape == self.mask.shape:
            return take(values.reshape(-1), rows)
        return values.reshape(-1)[owner] if values.dim() else values


def _check_offsets(cu_seqlens: Tensor, length: int) -> None:
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != length or offsets != sorted(offsets):
        shown = offsets if len(offsets) <= 8 else [*offsets[:4], "...", *offsets[-3:]]
        raise ValueError(f"cu_seqlens must rise from 0 to L = {length}, got {shown}")
