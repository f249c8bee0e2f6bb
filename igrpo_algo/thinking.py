"""The thinking in a completion: how models mark it, and how to drop it.

Rewards, drafts and tokenizers read the same table, so that they agree on what the answer is.
"""

import re
from reprlib import repr as shown  # short, of anything

THINKING_MARKS = (
    ("<think>", "</think>"),  # DeepSeek, Qwen, GLM and most others
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel>", "<channel|>"),  # Gemma 4
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),  # gpt-oss
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi-VL
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    ("<longcat_think>", "</longcat_think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<reasoning>", "</reasoning>"),
)
"""What stands before thinking and behind it, one pair for each way of writing it."""

MARK_TOKENS = frozenset(
    token
    for pair in THINKING_MARKS
    for mark in pair
    for token in re.findall(r"<\|\w+\|>", mark) or [mark]
)
"""The marks, or the parts of them, that a tokenizer may have as one special token."""


def strip_thinking(text: str, *, open: str | None = None, close: str | None = None) -> str:
    r"""Drop the thinking from a completion and keep the answer.

    A closed block goes with its marks. A block that is never closed runs to the end of the text: a
    completion cut off while it thinks has no answer. A close without an open ends thinking that
    began in the prompt (many chat templates open it there): all that precedes it goes. Space
    around what is left is stripped.

    Args:
        text: A completion.
        open: The mark before the thinking; None, for both, means all `THINKING_MARKS`.
        close: The mark after it.

    Returns:
        The answer; may be empty.

    Raises:
        TypeError: An argument is not a string.
        ValueError: A mark is empty, the two are the same, or one is given without the other.

    Examples:
        >>> strip_thinking("<think>2 + 3 = 6? No.</think>\n\nIt is 5.")
        'It is 5.'
        >>> strip_thinking("2 + 3 = 6? No.[/THINK]\n\nIt is 5.")
        'It is 5.'
    """
    for name, value in (("text", text), ("open", open), ("close", close)):
        if name == "text" or value is not None:
            check_text(name, value)
    if open is None and close is None:
        for pair in THINKING_MARKS:
            text = _strip(text, *pair)
        return text.strip()
    if not open or not close or open == close:
        raise ValueError(f"open and close must be two different marks, got {open!r} and {close!r}")
    return _strip(text, open, close).strip()


def text_after_thinking(text: str) -> str | None:
    """Return what follows the last thinking; None for thinking that never ends.

    Unlike `strip_thinking`, this drops what was said before a block too: of two answers, the one
    after more thinking counts.

    Examples:
        >>> text_after_thinking("It is 4. <think>No.</think>It is 5.")
        'It is 5.'
        >>> text_after_thinking("It is 4. <think>No, ") is None
        True
    """
    check_text("text", text)
    for open, close in THINKING_MARKS:
        text = text.rpartition(close)[2]
        if open in text:
            return None
    return text


def check_text(name: str, value: object) -> str:
    """Return `value` if it is a string; raise TypeError otherwise."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__} {shown(value)}")
    return value


def _strip(text: str, open: str, close: str) -> str:
    if open not in text and close not in text:
        return text
    *closed, rest = text.split(close)
    answers: list[str] = []
    for piece in closed:
        answer, opened, _ = piece.partition(open)
        if opened:
            answers.append(answer)
        else:
            answers.clear()
    return "".join([*answers, rest.partition(open)[0]])
