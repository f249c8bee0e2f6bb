"""The Stage-2 prompt within a length: a prompt that is too long loses draft, never question.

len(q) + len(bridge) + len(draft) <= max_prompt_tokens

Trainers cut a long prompt from the left, which takes the question and leaves the draft. Cut here,
before they see it. On token ids `splice_prompt_ids` does it in one step. Where a chat template
stands between text and ids, `fit_draft` does it through callables, so that any tokenizer serves.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from torch import Tensor

from igrpo_kernels.checks import check_count, describe

from .select import Keep, check_keep, truncate_draft


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

    One render where the draft fits, and as a rule three where it does not: the prompt with an empty
    draft gives the budget, and what tokenizing the shorter text adds is taken off it. A character
    that the cut splits is dropped. A few tokens of room may stay unused. Where there is no room at
    all, the draft comes back empty: take the plain prompt then, since the words around an empty
    draft may themselves exceed the limit.

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
        TypeError: `max_prompt_tokens` is no int.
        ValueError: `max_prompt_tokens` is negative, or `keep` is neither "tail" nor "head".

    Examples:
        >>> encode, decode = (lambda text: [*map(ord, text)]), (lambda ids: "".join(map(chr, ids)))
        >>> render = lambda draft: encode(f"1 + 1? [{draft}]")
        >>> fit_draft("so it is 2", render, encode=encode, decode=decode, max_prompt_tokens=15)[::2]
        ('t is 2', 4)
    """
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
        TypeError: Ids come as a tensor, or `max_prompt_tokens` is no int.
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
        TypeError: A count is no int.
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
