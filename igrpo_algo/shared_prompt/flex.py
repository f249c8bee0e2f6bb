"""Attention over a row that has each prompt once, in one FlexAttention kernel, for GPUs.

A token sees two ranges of keys: some of its prompt, and what precedes it in its own sequence.
The mask and the table of blocks that FlexAttention may skip both follow from these ranges, so a row
of many short groups costs one launch, and nothing of the size of the row squared exists.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Tokens of a block: FlexAttention skips pairs of blocks in which no query sees a key."""

LEAST_WIDTH = 16
"""FlexAttention's Triton kernels take heads of this width or wider."""

KERNELS = 64
"""Compiled kernels that are kept: two per row size (with and without gradients), and then some."""


class KeyRanges(NamedTuple):
    """The keys that each token sees, as two ranges [start, stop). Each field has shape [S]."""

    prompt_start: Tensor
    prompt_stop: Tensor
    own_start: Tensor
    own_stop: Tensor


def suits_flex(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Say whether FlexAttention runs these states: on CUDA, in up to 32 bits, without dropout."""
    return (
        query.device.type == "cuda"
        and query.dtype.itemsize <= 4
        and min(query.shape[3], value.shape[3]) >= LEAST_WIDTH
        and dropout == 0.0
    )


def attend_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[Sequence[int]],
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend as `attend_shared_prompt` does, with the same arguments and shapes.

    The row is padded to one of a few sizes, each of which is compiled once. A padding token sees
    itself alone, so padding costs memory and next to no time.
    """
    size = query.shape[2]
    room = padded_size(size)
    mask = block_mask(tuple(map(tuple, lengths)), room, window, query.device)
    states = (F.pad(x, (0, 0, 0, room - size)) for x in (query, key, value))
    with torch._dynamo.config.patch(recompile_limit=KERNELS):
        attended = _compiled()(*states, mask, scale)
    return attended[:, :, :size].transpose(1, 2)


def padded_size(size: int) -> int:
    """Round up to a power of two or three quarters of one, so that few sizes are compiled."""
    power = max(4 * BLOCK, 1 << (size - 1).bit_length())
    return power if size > power // 4 * 3 else power // 4 * 3


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_flex, dynamic=False)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)


@lru_cache(maxsize=8)
def block_mask(
    lengths: tuple[tuple[int, ...], ...], room: int, window: int | None, device: torch.device
) -> BlockMask:
    """Make the mask of a row; the layers that follow, and their backward, get the same one."""
    with torch.inference_mode(False):  # a mask made while scoring serves the training step too
        ranges = key_ranges(lengths, room, window, device)
        some, every = visible_blocks(ranges)
        prompt_start, prompt_stop, own_start, own_stop = ranges

        def sees(batch: Tensor, head: Tensor, at: Tensor, key: Tensor) -> Tensor:
            in_prompt = (prompt_start[at] <= key) & (key < prompt_stop[at])
            return in_prompt | ((own_start[at] <= key) & (key < own_stop[at]))

        partial, full = _listed(some & ~every), _listed(every)
        return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=sees)


def key_ranges(
    lengths: Sequence[Sequence[int]],
    room: int,
    window: int | None = None,
    device: torch.device | str = "cpu",
) -> KeyRanges:
    """Give each token of a row the ranges of keys that it sees.

    Args:
        lengths: `SharedPromptRow.lengths`.
        room: Places of the padded row, S; each place behind the row sees itself.
        window: A token sees this many tokens, itself among them; None: all before it.
        device: Where the ranges are needed.

    Examples:
        >>> for bounds in key_ranges([(2, 1, 2)], 6):
        ...     print(bounds.tolist())
        [0, 0, 0, 0, 0, 0]
        [0, 0, 2, 2, 2, 0]
        [0, 0, 2, 3, 3, 5]
        [1, 2, 3, 4, 5, 6]
    """
    rows = []  # size, start, and the prompt before it: one for each prompt and completion
    place = 0
    for prompt, *completions in lengths:
        rows.append((prompt, place, 0, 0))
        shared = place, place + prompt
        place += prompt
        for size in completions:
            rows.append((size, place, *shared))
            place += size
    rows += [(1, padding, 0, 0) for padding in range(place, room)]
    table = torch.tensor(rows, dtype=torch.int32).t()
    start, prompt_start, prompt_stop = table[1:].repeat_interleave(table[0], 1)
    stop = torch.arange(1, room + 1, dtype=torch.int32)
    if window is not None:
        prompt_start = prompt_start.maximum(prompt_stop - window + (stop - start))
        start = start.maximum(stop - window)
    return KeyRanges(*torch.stack([prompt_start, prompt_stop, start, stop]).to(device))


def visible_blocks(ranges: KeyRanges) -> tuple[Tensor, Tensor]:
    """Say of each block of queries and of keys whether some pair is seen, and whether all are.

    All is not claimed of a block that a token sees through both of its ranges, which costs a mask
    that was not needed. Each of shape [S / BLOCK, S / BLOCK].
    """
    prompt_start, prompt_stop, own_start, own_stop = (bound[:, None] for bound in ranges)
    first = torch.arange(0, len(prompt_start), BLOCK, device=prompt_start.device)
    last = first + BLOCK
    some = (prompt_start < last) & (prompt_stop > first) & (prompt_start < prompt_stop)
    some |= (own_start < last) & (own_stop > first)
    every = (prompt_start <= first) & (prompt_stop >= last)
    every |= (own_start <= first) & (own_stop >= last)
    return some.unflatten(0, (-1, BLOCK)).any(1), every.unflatten(0, (-1, BLOCK)).all(1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and their indices, padded with others."""
    counts = blocks.sum(1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None]
