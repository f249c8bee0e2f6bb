"""What a sampler returns, one value per completion, and the two tensor layouts made of many."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from igrpo_kernels.checks import LARGEST_FLOAT32, check_count, describe

from ..flat import flat_tensor
from ..prompts import check_entries, check_ids, decode_completion


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        token_ids: The tokens drawn, the stop token included if one ended it; may be empty.
        text: What the tokens say, special tokens left out, thinking marks kept.
        logprobs: Log-probability of each token as a loss computes it: at the temperature that drew
            it, over the whole vocabulary (top-p and the like left out). None where the sampler does
            not know them.
        finish_reason: "stop" (a stop token or string), "length" (ran into its token limit),
            "cancelled" (early selection), "skipped" (its prompt was), or what the sampler says.

    Raises:
        TypeError: A field has another type.
        ValueError: A token id is negative, `logprobs` and `token_ids` differ in length, or a
            log-prob is not finite.

    Examples:
        >>> Completion([5, 2], "four", [-0.1, -0.2]).finish_reason
        'stop'
    """

    token_ids: list[int]
    text: str
    logprobs: list[float] | None = None
    finish_reason: str = "stop"

    @classmethod
    def decoded(cls, token_ids: Sequence[int], tokenizer: Any, **fields: Any) -> Self:
        """Make one whose text is what its tokens say; `fields` are the other attributes."""
        ids = list(token_ids)
        return cls(ids, decode_completion(ids, tokenizer), **fields)

    def __post_init__(self) -> None:
        check_ids("token_ids", self.token_ids)
        for name in ("text", "finish_reason"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string, got {describe(getattr(self, name))}")
        if self.logprobs is not None:
            self._check_logprobs(self.logprobs)

    def _check_logprobs(self, logprobs: Sequence[float]) -> None:
        check_entries("logprobs", logprobs, (int, float), "a number")
        if len(logprobs) != len(self.token_ids):
            raise ValueError(
                f"logprobs must hold one number per token: {len(logprobs)} log-probs "
                f"for {len(self.token_ids)} token_ids"
            )
        bound = LARGEST_FLOAT32
        if logprobs and not (
            -bound <= min(logprobs) <= max(logprobs) <= bound and all(map(math.isfinite, logprobs))
        ):
            place = next(i for i, each in enumerate(logprobs) if not abs(each) <= bound)
            raise ValueError(
                f"logprobs must be finite, got {logprobs[place]} for token {place}: does the model "
                "give NaN?"
            )


CompletionGroups = list[list[Completion]]


class Padded(NamedTuple):
    """B completions of at most T tokens, side by side.

    Attributes:
        ids: Token ids, `pad_token_id` in masked slots. Shape [B, T], int64.
        mask: True where a token counts. Shape [B, T].
        logprobs: The sampler's, zero in masked slots; None if any completion lacks them.
            Shape [B, T], float32.
    """

    ids: Tensor
    mask: Tensor
    logprobs: Tensor | None


class Packed(NamedTuple):
    """B completions one after the other.

    Attributes:
        ids: Token ids. Shape [L], int64.
        cu_seqlens: Offsets of the completions. Shape [B + 1], int32.
        logprobs: The sampler's; None if any completion lacks them. Shape [L], float32.
    """

    ids: Tensor
    cu_seqlens: Tensor
    logprobs: Tensor | None


def pad_completions(completions: Sequence[Completion], *, pad_token_id: int = 0) -> Padded:
    """Lay completions side by side, padded on the right to the longest.

    No completions give tensors of shape [0, 0]; completions without tokens give rows whose mask is
    False throughout.

    Args:
        completions: B completions.
        pad_token_id: Fills the masked slots of `ids`.

    Returns:
        Ids, mask and sampler log-probs, on the CPU.

    Examples:
        >>> pad_completions([Completion([7, 8], "a"), Completion([9], "b")]).ids
        tensor([[7, 8],
                [9, 0]])
    """
    check_count("pad_token_id", pad_token_id, at_least=0)
    packed = pack_completions(completions)
    lengths = packed.cu_seqlens.diff().long()
    width = int(lengths.max()) if len(completions) else 0
    mask = torch.arange(width) < lengths[:, None]
    ids = torch.full(mask.shape, pad_token_id).masked_scatter(mask, packed.ids)
    if packed.logprobs is None:
        return Padded(ids, mask, None)
    return Padded(ids, mask, torch.zeros(mask.shape).masked_scatter(mask, packed.logprobs))


def pack_completions(completions: Sequence[Completion]) -> Packed:
    """Lay completions one after the other, without padding.

    Args:
        completions: B completions.

    Returns:
        Ids, offsets and sampler log-probs, on the CPU.

    Examples:
        >>> pack_completions([Completion([7, 8], "a"), Completion([9], "b")]).cu_seqlens
        tensor([0, 2, 3], dtype=torch.int32)
    """
    check_entries("completions", completions, (Completion,), "a Completion")
    ids = flat_tensor((completion.token_ids for completion in completions), torch.int64)
    ends = accumulate((len(completion.token_ids) for completion in completions), initial=0)
    cu_seqlens = torch.tensor(list(ends), dtype=torch.int32)
    known = [completion.logprobs for completion in completions if completion.logprobs is not None]
    if len(known) < len(completions):
        return Packed(ids, cu_seqlens, None)
    return Packed(ids, cu_seqlens, flat_tensor(known, torch.float32))


def check_groups(groups: object, count: int, n: int) -> CompletionGroups:
    """Return what the sampler gave as lists, if it is `count` groups of n completions."""
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(f"sampler must return a list of groups, got {describe(groups)}")
    if len(groups) != count:
        raise ValueError(
            f"sampler must return one group per prompt: {len(groups)} groups for {count} prompts"
        )
    for index, group in enumerate(groups):
        if isinstance(group, str) or not isinstance(group, Sequence):
            raise TypeError(
                f"sampler must return a list of completions per prompt, got {describe(group)} "
                f"for prompt {index}"
            )
        if len(group) != n:
            raise ValueError(
                f"sampler must return n = {n} completions per prompt, got {len(group)} "
                f"for prompt {index}"
            )
        for completion in group:
            if not isinstance(completion, Completion):
                raise TypeError(
                    f"sampler must return Completion values, got {describe(completion)} "
                    f"for prompt {index}"
                )
    return [list(group) for group in groups]
