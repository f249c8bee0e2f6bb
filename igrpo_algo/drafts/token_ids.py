"""Drafts as token ids: cut to a length, counted, and put after a question.

len(q) + len(bridge) + len(draft) <= max_prompt_tokens

A prompt that is too long loses draft, never question.
"""

from collections.abc import Collection, Sequence
from typing import Literal, TypeVar

from torch import Tensor

from igrpo_kernels.checks import check_count, check_integral, check_rank, describe

TokenIds = TypeVar("TokenIds", list[int], Tensor)
Keep = Literal["tail", "head"]


def truncate_draft(draft_ids: TokenIds, max_tokens: int, *, keep: Keep = "tail") -> TokenIds:
    """Cut a draft to at most `max_tokens` tokens.

    keep="tail" cuts the beginning and keeps the last tokens, where the final answer stands;
    keep="head" cuts the end and keeps the first. A draft that fits comes back whole, and
    `max_tokens=0` gives an empty one. The paper states no rule for long drafts.

    Args:
        draft_ids: A list of token ids, or a tensor of shape [T].
        max_tokens: The most tokens to keep.
        keep: Which end to keep.

    Returns:
        A new list, or a view of the tensor: the type of `draft_ids`.

    Raises:
        TypeError: `draft_ids` is neither list nor integer tensor, or `max_tokens` not an int.
        ValueError: The tensor is not of shape [T], `max_tokens` is negative, or `keep` is neither.

    Examples:
        >>> truncate_draft([5, 6, 7, 8], 3)
        [6, 7, 8]
    """
    if isinstance(draft_ids, Tensor):
        check_rank("draft_ids", check_integral("draft_ids", draft_ids), 1, "[T]")
    elif not isinstance(draft_ids, list):
        raise TypeError(f"draft_ids must be a list or a tensor, got {describe(draft_ids)}")
    check_count("max_tokens", max_tokens, at_least=0)
    if check_keep(keep) == "head":
        return draft_ids[:max_tokens]
    return draft_ids[max(len(draft_ids) - max_tokens, 0) :]


def splice_prompt_ids(
    prompt_ids: Sequence[int],
    draft_ids: Sequence[int],
    *,
    before_ids: Sequence[int] = (),
    after_ids: Sequence[int] = (),
    special_ids: Collection[int] = (),
    max_prompt_tokens: int | None = None,
    keep: Keep = "tail",
) -> list[int]:
    """Put a draft after the question, in token ids.

    q' = q + before + draft + after

    `splice_prompt` without tokenizing again: the draft's ids stay those that the model sampled.
    What closes the user's turn and opens the assistant's belongs into `after_ids`. The draft is cut
    where the whole is too long. iGRPO: arXiv:2602.09000, equation 3.

    Args:
        prompt_ids: The question.
        draft_ids: The draft.
        before_ids: What stands between question and draft.
        after_ids: What follows the draft.
        special_ids: Control tokens; those in the draft are dropped (its end-of-sequence, say).
        max_prompt_tokens: The most tokens of the result; None sets no limit.
        keep: Which end of a draft that is too long to keep. See `truncate_draft`.

    Returns:
        The ids of the spliced prompt.

    Raises:
        TypeError: Ids come as a tensor, or `max_prompt_tokens` is not an int.
        ValueError: What surrounds the draft exceeds `max_prompt_tokens` alone, or `keep` is
            neither "tail" nor "head".

    Examples:
        >>> splice_prompt_ids([1, 2], [7, 8, 9], after_ids=[3], max_prompt_tokens=5)
        [1, 2, 8, 9, 3]
    """
    parts = {
        "prompt_ids": prompt_ids,
        "draft_ids": draft_ids,
        "before_ids": before_ids,
        "after_ids": after_ids,
    }
    for name, ids in parts.items():
        if isinstance(ids, Tensor):
            raise TypeError(f"{name} must be a sequence of int (.tolist()), got {describe(ids)}")
    dropped = frozenset(special_ids)
    draft = [token for token in draft_ids if token not in dropped]
    room = len(draft)
    if max_prompt_tokens is not None:
        bridge_tokens = len(before_ids) + len(after_ids)
        room = draft_budget(max_prompt_tokens, len(prompt_ids), bridge_tokens)
    return [*prompt_ids, *before_ids, *truncate_draft(draft, room, keep=keep), *after_ids]


def draft_budget(max_prompt_tokens: int, question_tokens: int, bridge_tokens: int = 0) -> int:
    """Count the tokens that a prompt has left for its draft.

    budget = max_prompt_tokens - question_tokens - bridge_tokens

    Args:
        max_prompt_tokens: The most tokens that the spliced prompt may have.
        question_tokens: Tokens of the question, with what a chat template adds to it.
        bridge_tokens: Tokens of the words around the draft.

    Returns:
        The budget, at least 0.

    Raises:
        TypeError: A count is not an int.
        ValueError: A count is negative, or question and bridge alone exceed the maximum.

    Examples:
        >>> draft_budget(1024, 200, 60)
        764
    """
    check_count("max_prompt_tokens", max_prompt_tokens, at_least=0)
    check_count("question_tokens", question_tokens, at_least=0)
    check_count("bridge_tokens", bridge_tokens, at_least=0)
    budget = max_prompt_tokens - question_tokens - bridge_tokens
    if budget < 0:
        raise ValueError(
            f"max_prompt_tokens must hold the prompt without its draft: {question_tokens} tokens "
            f"of question and {bridge_tokens} of bridge do not fit into {max_prompt_tokens}"
        )
    return budget


def check_keep(keep: Keep) -> Keep:
    """Return `keep` if it is "tail" or "head"; raise ValueError otherwise."""
    if keep not in ("tail", "head"):
        raise ValueError(f"keep must be 'tail' or 'head', got {keep!r}")
    return keep
