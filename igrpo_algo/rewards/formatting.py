"""Rewards for the form of a completion: thinking first, then the answer, each between its tags."""

from collections.abc import Sequence

from igrpo_kernels.checks import check_flag

from .answers import CompletionLike, check_column, completion_text


def format_reward(
    completions: Sequence[CompletionLike], *, think_opened: bool = False, **columns: object
) -> list[float]:
    """Score 1 for `<think>...</think>` followed by `<answer>...</answer>` and nothing else.

    Each of the four tags must occur once, in this order, with text inside both pairs. Blanks are
    allowed before, between and after them.

    Source: iGRPO, arXiv:2602.09000, App. C, which names a format reward and the tags; the exact
    rule is ours.

    Args:
        completions: One per row: a string or a list of messages.
        think_opened: The chat template writes `<think>` itself, so completions lack it.
        **columns: Whatever else a trainer passes; ignored.

    Returns:
        One score per completion.

    Raises:
        TypeError: A completion is neither a string nor a list of messages.

    Examples:
        >>> format_reward(["<think>6 * 7</think> <answer>42</answer>", "<answer>42</answer>"])
        [1.0, 0.0]
    """
    prefix = "<think>" if check_flag("think_opened", think_opened) else ""
    check_column("completions", completions)
    texts = map(completion_text, completions)
    return [float(_is_formatted(prefix + text)) for text in texts]


def opened_format_reward(completions: Sequence[CompletionLike], **columns: object) -> list[float]:
    """Score like `format_reward` if the chat template has written `<think>` already.

    Args:
        completions: One per row: a string or a list of messages.
        **columns: Whatever else a trainer passes; ignored.

    Returns:
        One score per completion.

    Examples:
        >>> opened_format_reward(["6 * 7</think><answer>42</answer>"])
        [1.0]
    """
    return format_reward(completions, think_opened=True)


def _is_formatted(text: str) -> bool:
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if any(text.count(tag) != 1 for tag in tags):
        return False
    before, _, rest = text.partition("<think>")
    thought, thought_closed, rest = rest.partition("</think>")
    between, answer_opened, rest = rest.partition("<answer>")
    answer, answer_closed, after = rest.partition("</answer>")
    in_order = bool(thought_closed and answer_opened and answer_closed)
    filled = bool(thought.strip() and answer.strip())
    return in_order and filled and not (before + between + after).strip()
