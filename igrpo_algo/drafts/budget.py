"""Cut a draft to a length, or until its rendered prompt fits; the question is never cut.

Trainers cut a long prompt from the left, so the question goes and the draft stays. Cut the draft
here, before they see the prompt. Where a chat template stands between text and ids, `fit_draft`
works through callables, so any tokenizer will do.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

from torch import Tensor

from igrpo_kernels.checks import (
    check_callable,
    check_count,
    check_integral,
    check_rank,
    describe,
)

from ..prompts import check_ids
from ..thinking import check_text

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
        What is left, of the type of `draft_ids`; a view if that is a tensor.

    Raises:
        TypeError: `draft_ids` is neither list nor integer tensor, or `max_tokens` not an int.
        ValueError: The tensor is not of shape [T], `max_tokens` is negative, or `keep` is neither.

    Examples:
        >>> truncate_draft([5, 6, 7, 8], 3)
        [6, 7, 8]
    """
    if isinstance(draft_ids, Tensor):
        check_rank("draft_ids", check_integral("draft_ids", draft_ids), 1, "[T]")
    else:
        check_ids("draft_ids", draft_ids)
    check_count("max_tokens", max_tokens, at_least=0)
    if check_keep(keep) == "head":
        return draft_ids[:max_tokens]
    return draft_ids[max(len(draft_ids) - max_tokens, 0) :]


class FittedDraft(NamedTuple):
    """A draft cut to the room that its prompt has.

    Attributes:
        draft: The text that is left of it.
        prompt_ids: The spliced prompt rendered with that text.
        tokens_cut: Draft tokens that were cut off; 0 where all fit.
    """

    draft: str
    prompt_ids: list[int]
    tokens_cut: int


def fit_draft(
    draft: str,
    render: Callable[[str], list[int]],
    *,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    max_prompt_tokens: int,
    keep: Keep = "tail",
) -> FittedDraft:
    """Cut a draft until its rendered prompt fits; the question stays whole.

    Renders once if the draft fits, and usually three times if it does not: the prompt with an empty
    draft gives the budget, less the tokens that tokenizing the shorter text adds. A character that
    the cut splits is dropped. A few tokens of room may stay unused. Without any room the draft
    comes back empty: use the plain prompt then, since the words around an empty draft may exceed
    the limit by themselves.

    Args:
        draft: The chosen completion as text.
        render: From the draft to the ids of the whole prompt: `splice_prompt`, then the chat
            template, then the tokenizer. It may neutralize the draft; it must not cut.
        encode: From text to ids, without special tokens.
        decode: From ids to text.
        max_prompt_tokens: The most tokens that the rendered prompt may have.
        keep: Which end of a draft that is too long to keep. See `truncate_draft`.

    Returns:
        The draft's text, the prompt's ids, and the number of draft tokens cut.

    Raises:
        TypeError: `draft` is not a string, `render`, `encode` or `decode` cannot be called, or
            `max_prompt_tokens` is not an int.
        ValueError: `max_prompt_tokens` is negative, or `keep` is neither "tail" nor "head".

    Examples:
        >>> encode, decode = (lambda text: [*map(ord, text)]), (lambda ids: "".join(map(chr, ids)))
        >>> render = lambda draft: encode(f"1 + 1? [{draft}]")
        >>> fit_draft("so it is 2", render, encode=encode, decode=decode, max_prompt_tokens=15)[::2]
        ('t is 2', 4)
    """
    check_text("draft", draft)
    for name, function in (("render", render), ("encode", encode), ("decode", decode)):
        check_callable(name, function)
    check_count("max_prompt_tokens", max_prompt_tokens, at_least=0)
    check_keep(keep)
    prompt_ids = render(draft)
    if len(prompt_ids) <= max_prompt_tokens:
        return FittedDraft(draft, prompt_ids, 0)
    bare_ids = render("")
    draft_ids = encode(draft)
    room = min(len(draft_ids), max_prompt_tokens - len(bare_ids))
    while room > 0:
        text = decode(truncate_draft(draft_ids, room, keep=keep)).strip("\ufffd")
        prompt_ids = render(text)
        over = len(prompt_ids) - max_prompt_tokens
        if over <= 0:
            return FittedDraft(text, prompt_ids, len(draft_ids) - room)
        room -= over
    return FittedDraft("", bare_ids, len(draft_ids))


def check_keep(keep: Keep) -> Keep:
    """Return `keep` if it is "tail" or "head"; raise ValueError otherwise."""
    if not isinstance(keep, str) or keep not in ("tail", "head"):
        raise ValueError(f"keep must be 'tail' or 'head', got {describe(keep)}")
    return keep
