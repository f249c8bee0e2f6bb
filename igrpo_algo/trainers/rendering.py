"""A trainer's own way from chat messages to tokens, as a tokenizer."""

from collections.abc import Callable
from typing import Any


class AsTokenizer:
    """The tokenizer, with the trainer's own rendering in place of its template.

    Args:
        tokenizer: The model's tokenizer.
        render: Gives the ids of chat messages, the assistant's turn opened.
    """

    def __init__(self, tokenizer: Any, render: Callable[[list[dict[str, Any]]], list[int]]) -> None:
        self._tokenizer = tokenizer
        self._render = render

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tokenize text."""
        return self._tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> list[int]:
        """Return the ids of the messages."""
        return self._render(messages)
