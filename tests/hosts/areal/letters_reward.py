"""A reward that AReaL's worker processes can import."""

from typing import Any


def letters(
    prompt: str, completion: str, prompt_ids: Any, completion_ids: Any, answer: str, **_: Any
) -> float:
    """Reward by the letters; both stages see the question, and no draft in it."""
    assert prompt == f"<s>user:{answer}?</s><s>assistant:", prompt
    return float(sum(map(ord, completion)))
