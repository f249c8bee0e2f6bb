"""What of a data set the two stages cannot take, found before a model is loaded or sampled from."""

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset

from igrpo_kernels.checks import describe

from ...drafts.markers import marker_tokens
from ...prompts import Prompt


def check_images(*datasets: Any) -> None:
    """Raise ValueError if a data set has images."""
    for dataset in _parts(*datasets):
        columns = getattr(dataset, "column_names", None) or []
        if "image" in columns or "images" in columns:
            raise ValueError("a data set with images can't be combined with iGRPO's drafts")


def check_prompts(tokenizer: Any, chat_template_kwargs: Mapping[str, Any], *datasets: Any) -> None:
    """Raise ValueError, with the row, if a draft would not land in a user's message.

    Data sets that are streamed cannot be looked through; there the splice refuses a conversation
    without a user's message when it comes to it.
    """
    turn = _opened_turn(tokenizer, chat_template_kwargs)
    controls = tuple(set(marker_tokens(tokenizer)) & set(tokenizer.get_vocab()))
    for dataset in _parts(*datasets):
        if isinstance(dataset, Dataset) and "prompt" in dataset.column_names:
            for row, prompt in enumerate(dataset["prompt"]):
                _check_prompt(row, prompt, turn, controls, tokenizer.bos_token)


def _check_prompt(
    row: int, prompt: Prompt, turn: str, controls: tuple[str, ...], bos_token: str | None
) -> None:
    if not isinstance(prompt, str):
        if not all(isinstance(message, Mapping) for message in prompt):
            raise ValueError(
                f"row {row} of the data set must be a string or a conversation, got "
                f"{describe(prompt)}: TRL takes no token ids"
            )
        if not any(message["role"] == "user" for message in prompt):  # type: ignore[index]
            raise ValueError(
                f"row {row} of the data set has a conversation without a user's message, which "
                "is where the draft goes; give one, or train with num_drafts=0"
            )
        for message in prompt:
            _check_content(row, message.get("content"))  # type: ignore[union-attr]
        return
    text = prompt.removeprefix(bos_token or "").rstrip()
    found = [control for control in controls if control in text]
    if turn and text.endswith(turn):
        found.append(turn)
    if found:
        raise ValueError(
            f"row {row} of the data set is a string that already carries a chat template "
            f"({max(found, key=len)!r}), so the draft would stand in the assistant's turn; give "
            "the conversation as a list of messages, or rules with a splice of your own"
        )


def _check_content(row: int, content: Any) -> None:
    kinds = [part.get("type") for part in content] if isinstance(content, list) else []
    others = sorted({str(kind) for kind in kinds} - {"text"})
    if others:
        raise ValueError(
            f"row {row} of the data set has a message with a part of type {', '.join(others)}: "
            "the trainer takes text alone"
        )


def _opened_turn(tokenizer: Any, chat_template_kwargs: Mapping[str, Any]) -> str:
    """Return the text by which the chat template opens the assistant's turn; empty without one."""
    if tokenizer.chat_template is None:
        return ""
    question = [{"role": "user", "content": "?"}]
    closed, opened = (
        tokenizer.apply_chat_template(
            question, tokenize=False, add_generation_prompt=opens, **chat_template_kwargs
        )
        for opens in (False, True)
    )
    return str(opened).removeprefix(str(closed)).strip()


def _parts(*datasets: Any) -> Iterator[Any]:
    for dataset in datasets:
        yield from dataset.values() if isinstance(dataset, dict) else [dataset]
