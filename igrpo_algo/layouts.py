"""Sequences of prompt and completion, laid out for a model: padded, or one after the other in rows.

A layout has the model's inputs, the positions that predict completion tokens, and the numbers of
the sequences that it holds. A third one, with each prompt once before all of its completions, is in
`shared_prompt.packing`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from igrpo_kernels.checks import check_count, check_list, check_tensor

from .fields import check_fields
from .flat import flat_tensor
from .prompts import check_ids

Layout = TypeVar("Layout", bound="PaddedRows | PackedRow")


def move(layout: Layout, device: torch.device | str) -> Layout:
    """Move the tensors of a layout."""
    moved: dict[str, Any] = {
        name: value.to(device) for name, value in vars(layout).items() if isinstance(value, Tensor)
    }
    return replace(layout, **moved)


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """B sequences side by side, padded on the right to S tokens.

    Attributes:
        input_ids: Prompt, completion, padding. Shape [B, S], int64.
        attention_mask: False on the padding. Shape [B, S], bool.
        mask: True where the next token is one of the completion. Shape [B, S - 1], bool.
        index: Number of each row's sequence, in the order given. Shape [B], int64.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    index: Tensor

    def __post_init__(self) -> None:
        check_fields(self)

    def to(self, device: torch.device | str) -> "PaddedRows":
        """Move the tensors."""
        return move(self, device)

    def model_inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of a transformers model."""
        mask = self.attention_mask.long()
        return {"input_ids": self.input_ids, "attention_mask": mask, "use_cache": False}

    def loss_inputs(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return `hidden`, `targets` and `mask` as `linear_policy_loss` takes them.

        Args:
            hidden: Last hidden states, or logits. Shape [B, S, H].

        Raises:
            TypeError: `hidden` is not a tensor.
            ValueError: `hidden` has other axes.
        """
        check_tensor("hidden", hidden)
        if hidden.dim() != 3 or hidden.shape[:2] != self.input_ids.shape:
            raise ValueError(
                f"hidden must have shape [B, S, H] with B, S = {list(self.input_ids.shape)}, "
                f"got {list(hidden.shape)}"
            )
        return {"hidden": hidden[:, :-1], "targets": self.input_ids[:, 1:], "mask": self.mask}

    def place(self, values: Sequence[Sequence[float]]) -> Tensor:
        """Lay one value per completion token where the mask is True. Shape [B, S - 1], float32."""
        flat = flat_tensor(values, torch.float32)
        return torch.zeros(self.mask.shape).masked_scatter(self.mask, flat)


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One row of S tokens: sequences one after the other, told apart by their positions.

    The L completion tokens among them are what a loss sees, as B packed sequences.

    Attributes:
        input_ids: Tokens of the row. Shape [1, S], int64.
        position_ids: Their positions, from 0 in each sequence. Shape [1, S], int64.
        index: Number of each sequence, in the order given. Shape [B], int64.
        cu_seqlens: Offsets of the completions among the L tokens. Shape [B + 1], int32.
        targets: The L completion tokens. Shape [L], int64.
        predictors: The position in the row that predicts each target. Shape [L], int64.
    """

    input_ids: Tensor
    position_ids: Tensor
    index: Tensor
    cu_seqlens: Tensor
    targets: Tensor
    predictors: Tensor

    def __post_init__(self) -> None:
        check_fields(self)

    def to(self: Layout, device: torch.device | str) -> Layout:
        """Move the tensors."""
        return move(self, device)

    def model_inputs(self) -> dict[str, Any]:
        """Return a transformers model's keyword arguments; positions tell the sequences apart."""
        positions = self.position_ids
        return {"input_ids": self.input_ids, "position_ids": positions, "use_cache": False}

    def loss_inputs(self, hidden: Tensor) -> dict[str, Tensor]:
        """Return `hidden`, `targets` and `cu_seqlens` as `linear_policy_loss` takes them.

        Args:
            hidden: Last hidden states of the row, or logits. Shape [1, S, H] or [S, H].

        Raises:
            TypeError: `hidden` is not a tensor.
            ValueError: `hidden` is not one row of S positions.
        """
        check_tensor("hidden", hidden)
        size = self.input_ids.shape[1]
        if hidden.shape[:-1] not in ((1, size), (size,)):
            raise ValueError(
                f"hidden must have shape [1, S, H] or [S, H] with S = {size}, "
                f"got {list(hidden.shape)}"
            )
        rows = hidden.reshape(size, hidden.shape[-1]).index_select(0, self.predictors)
        return {"hidden": rows, "targets": self.targets, "cu_seqlens": self.cu_seqlens}

    def place(self, values: Sequence[Sequence[float]]) -> Tensor:
        """Lay one value per completion token beside its target. Shape [L], float32."""
        return flat_tensor(values, torch.float32)


def _sizes(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[int]:
    """Count the tokens of each prompt with its completion."""
    if len(check_list("prompts", prompts)) != len(check_list("completions", completions)):
        raise ValueError(
            f"completions must hold one per prompt = {len(prompts)}, got {len(completions)}"
        )
    sizes = []
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not check_ids(f"prompts[{index}]", prompt):  # would predict the first of the completion
            raise ValueError(f"prompts[{index}] must have at least one token, got none")
        sizes.append(len(prompt) + len(check_ids(f"completions[{index}]", completion)))
    return sizes


def pad_sequences(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    *,
    pad_token_id: int,
    max_tokens: int | None = None,
) -> list[PaddedRows]:
    """Lay sequences side by side, at most `max_tokens` with padding in each batch of them.

    Args:
        prompts: Token ids of each prompt; none may be empty.
        completions: Token ids of each completion.
        pad_token_id: What fills the rows.
        max_tokens: None lays all sequences in one batch.

    Raises:
        ValueError: A prompt has no tokens, a sequence exceeds `max_tokens`, or there is not one
            completion per prompt.

    Examples:
        >>> (rows,) = pad_sequences([[5, 6], [5]], [[7], [8]], pad_token_id=0)
        >>> rows.input_ids, rows.mask
        (tensor([[5, 6, 7], [5, 8, 0]]), tensor([[False,  True], [ True, False]]))
    """
    check_count("pad_token_id", pad_token_id, at_least=0)
    sizes = _sizes(prompts, completions)
    layouts = []
    for batch in fill(sizes, max_tokens, padded=True):
        rows = [flat_tensor((prompts[i], completions[i]), torch.int64) for i in batch]
        begin = torch.tensor([[len(prompts[i])] for i in batch])
        end = torch.tensor([[sizes[i]] for i in batch])
        ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        position = torch.arange(ids.shape[1])
        mask = (position >= begin) & (position < end)
        layouts.append(PaddedRows(ids, position < end, mask[:, 1:], torch.tensor(list(batch))))
    return layouts


def pack_sequences(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    *,
    max_tokens: int | None = None,
) -> list[PackedRow]:
    """Lay sequences one after the other, in rows of at most `max_tokens`.

    Args:
        prompts: Token ids of each prompt; none may be empty.
        completions: Token ids of each completion.
        max_tokens: None lays all sequences in one row.

    Raises:
        ValueError: As in `pad_sequences`.

    Examples:
        >>> (row,) = pack_sequences([[5, 6], [5]], [[7, 8], [9]])
        >>> row.input_ids, row.position_ids
        (tensor([[5, 6, 7, 8, 5, 9]]), tensor([[0, 1, 2, 3, 0, 1]]))
        >>> row.targets, row.predictors
        (tensor([7, 8, 9]), tensor([1, 2, 4]))
    """
    rows = fill(_sizes(prompts, completions), max_tokens)
    tails = [Tails(*each) for each in zip(prompts, ([c] for c in completions), count())]
    return [PackedRow(**lay_in_row([tails[i] for i in row])) for row in rows]


@dataclass(frozen=True)
class Tails:
    """A prompt and some of its completions; `first` is the number of their first one."""

    prompt: list[int]
    completions: list[list[int]]
    first: int

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))


def lay_in_row(groups: Sequence[Tails]) -> dict[str, Tensor]:
    """Lay each prompt once and its completions after it; give the fields of a `PackedRow`.

    Each completion continues at its prompt's position, and its first token is predicted from the
    prompt's last one.
    """
    ids: list[Sequence[int]] = []
    positions: list[Sequence[int]] = []
    predictors: list[Sequence[int]] = []
    end = 0
    for group in groups:
        ids += [group.prompt, *group.completions]
        size = len(group.prompt)
        positions.append(range(size))
        end += size
        last = end - 1
        for tail in group.completions:
            positions.append(range(size, size + len(tail)))
            predictors += [(last,), range(end, end + len(tail) - 1)] if tail else []
            end += len(tail)
    tails = [tail for group in groups for tail in group.completions]
    index = [group.first + at for group in groups for at in range(len(group.completions))]
    ends = [0, *accumulate(map(len, tails))]
    return {
        "input_ids": flat_tensor(ids, torch.int64)[None],
        "position_ids": flat_tensor(positions, torch.int64)[None],
        "index": torch.tensor(index, dtype=torch.int64),
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
        "targets": flat_tensor(tails, torch.int64),
        "predictors": flat_tensor(predictors, torch.int64),
    }


def fill(sizes: Sequence[int], limit: int | None, *, padded: bool = False) -> Iterator[list[int]]:
    """Put items into as few batches as their order allows, each within the limit.

    Args:
        sizes: The tokens of each item.
        limit: Maximum tokens of a batch; None: no limit.
        padded: Whether an item takes as many tokens as the longest of its batch.

    Yields:
        The positions of the items in a batch.

    Raises:
        ValueError: An item alone exceeds the limit.
    """
    most = math.inf if limit is None else check_count("max_tokens", limit)
    batch: list[int] = []
    longest = tokens = 0
    for at, size in enumerate(sizes):
        if size > most:
            raise ValueError(f"max_tokens must hold each sequence: one has {size}, got {limit}")
        longest, tokens = max(longest, size), tokens + size
        if batch and (longest * (len(batch) + 1) if padded else tokens) > most:
            yield batch
            batch, longest, tokens = [], size, size
        batch.append(at)
    if batch:
        yield batch
