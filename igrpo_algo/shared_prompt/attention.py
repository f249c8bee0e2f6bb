"""Attention over a row that has each prompt once, equal to that over each completion by itself.

A prompt attends to itself; its completions attend, as a batch, to the prompt's keys and to their
own. Nothing of the size of the row squared exists: completions of T tokens share one mask of size
[T, P + T], and a prompt has one, of [P, P], only where a window cuts it. On CUDA one kernel does
all of it (`flex`).
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .flex import attend_flex, suits_flex

MOST_PADDING = 0.25
"""Completions are attended together while none would be padded by more than this share."""


class _States(NamedTuple):
    """Query, key and value of one prompt or completion. Each of shape [tokens, heads, D]."""

    query: Tensor
    key: Tensor
    value: Tensor


def attend_shared_prompt(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[Sequence[int]],
    *,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend causally within each sequence [prompt, completion] of a `SharedPromptRow`.

    Equals causal attention over each sequence by itself, in value and gradient; the gradients of a
    prompt's keys and values are summed over its completions.

    Args:
        query: Shape [1, heads, S, D], positions already encoded.
        key: Shape [1, key heads, S, D], where key heads divide the heads.
        value: Shape [1, key heads, S, D].
        lengths: `SharedPromptRow.lengths`.
        scale: Factor on the products; None: 1 / sqrt(D).
        window: A token sees this many tokens, itself among them; None: all before it.
        dropout: Share of attention weights dropped.

    Returns:
        Shape [1, S, heads, D].

    Examples:
        >>> query = key = value = torch.zeros(1, 2, 5, 4)
        >>> attend_shared_prompt(query, key, value, [[2, 2, 1]]).shape
        torch.Size([1, 5, 2, 4])
    """
    if suits_flex(query, value, dropout):
        return attend_flex(query, key, value, lengths, scale=scale, window=window)
    if query.device.type != "cpu":  # CUDA's kernels take a mask or grouped heads, not both
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    sizes = [size for group in lengths for size in group]
    split = (states[0].transpose(0, 1).split(sizes) for states in (query, key, value))
    states = map(_States, *split)
    attend = partial(_attend, scale=scale, window=window, dropout=dropout)
    attended: list[Tensor] = []
    for group in lengths:
        prompt, *completions = (next(states) for _ in group)
        shared = prompt if window is None else _States(*(x[-window:] for x in prompt))
        rows: dict[int, Tensor] = {}
        for batch in _batches(group[1:]):
            together = attend([completions[at] for at in batch], after=shared)
            for at, result in zip(batch, together, strict=True):
                rows[at] = result[: group[1 + at]]
        attended += [attend([prompt])[0], *(rows[at] for at in sorted(rows))]
    return torch.cat(attended)[None]


def _batches(sizes: Sequence[int]) -> list[list[int]]:
    """Completions that have tokens, in batches of like size, the longest first in each."""
    batches: list[list[int]] = []
    for at in sorted((at for at, size in enumerate(sizes) if size), key=lambda at: -sizes[at]):
        if not batches or sizes[at] < (1 - MOST_PADDING) * sizes[batches[-1][0]]:
            batches.append([])
        batches[-1].append(at)
    return batches


def _attend(
    states: list[_States],
    *,
    after: _States | None = None,
    scale: float | None,
    window: int | None,
    dropout: float,
) -> Tensor:
    """Attend causally within each of several sequences, after what they share.

    Padding comes last, where no token sees it. Shape [sequences, tokens, heads, D].
    """
    query, key, value = (pad_sequence(list(x), batch_first=True) for x in zip(*states, strict=True))
    if after is not None:
        shared_key, shared_value = (x.expand(len(states), -1, -1, -1) for x in after[1:])
        key, value = torch.cat([shared_key, key], 1), torch.cat([shared_value, value], 1)
    tokens, seen = query.shape[1], key.shape[1]
    mask: Tensor | None = None
    if tokens < seen or (window is not None and window < seen):
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=query.device)
        mask = mask.tril_(seen - tokens)
        mask = mask if window is None else mask.triu_(seen - tokens - window + 1)
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return attended.transpose(1, 2)
