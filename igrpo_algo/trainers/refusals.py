"""What adapters refuse, in the same words."""

from typing import Any

from ..drafts.markers import marker_tokens
from ..prompts import Prompt


def refuse_on(name: str, value: object, reason: str) -> None:
    """Refuse an option of the trainer that contradicts drafts.

    Args:
        name: What the trainer calls it.
        value: True, or anything but empty, where it is on.
        reason: Why it must be off.

    Raises:
        ValueError: It is on.

    Examples:
        >>> refuse_on("multi_turn", True, "a draft is one answer")
        Traceback (most recent call last):
        ValueError: multi_turn must be off: a draft is one answer
    """
    if value:
        raise ValueError(f"{name} must be off: {reason}")


def refuse_long(tokens: int, room: int | None, advice: str) -> None:
    """Refuse a prompt that the trainer would cut, draft or no draft.

    Args:
        tokens: Of the prompt.
        room: What the trainer leaves for prompts; None sets no limit.
        advice: Which option of the trainer to raise.

    Raises:
        ValueError: The prompt is longer.
    """
    if room is not None and tokens > room:
        raise ValueError(
            f"prompt has {tokens} tokens, and there is room for {room}: {advice}, since a question "
            "is never cut"
        )


def refuse_media(given: object) -> None:
    """Refuse a prompt that is more than text.

    Args:
        given: True, or anything but empty, where it has images, videos or audios.

    Raises:
        ValueError: It has some.
    """
    if given:
        raise ValueError("images, videos and audios can't be combined with drafts")


def refuse_templated(prompt: Prompt, tokenizer: Any, advice: str) -> None:
    """Refuse a string to which a chat template was applied.

    Args:
        prompt: What the trainer calls the prompt.
        tokenizer: The model's tokenizer.
        advice: Which option of the trainer does that.

    Raises:
        ValueError: A control token stands in the string.
    """
    if not isinstance(prompt, str):
        return
    found = next((token for token in marker_tokens(tokenizer) if token in prompt), None)
    if found is not None:
        raise ValueError(
            f"prompt is a string with {found!r} in it: a chat template was applied, and a draft "
            f"would stand in the assistant's turn; {advice} and give chat messages"
        )
