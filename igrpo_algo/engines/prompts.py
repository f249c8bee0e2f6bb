"""From a prompt in any of its forms to token ids, and from drawn ids to a completion."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..completions import Completion
from ..sampling import Prompt


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Give the token ids that a model sees for a prompt.

    Chat messages go through the tokenizer's chat template with a generation prompt; strings are
    tokenized with the tokenizer's special tokens; token ids are taken as they are.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if isinstance(prompt[0], Mapping):
        ids: Any = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return list(ids)
    return [int(token) for token in prompt]


def check_fits(name: str, ids: Sequence[int], room: int, max_new_tokens: int) -> None:
    """Raise ValueError unless a prompt has 1 to `room` tokens; nothing is ever cut."""
    if not 0 < len(ids) <= room:
        raise ValueError(
            f"{name} has {len(ids)} tokens, wanted 1 to {room} "
            f"(the model's context less max_new_tokens = {max_new_tokens})"
        )


def finish(
    tokenizer: Any, ids: list[int], logprobs: list[float] | None, stop_token_ids: Collection[int]
) -> Completion:
    """Make a completion of drawn ids: it ends with its first stop token, which is no text."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stop_token_ids), None)
    ids = ids[:end]
    return Completion(
        token_ids=ids,
        text=str(tokenizer.decode(ids, skip_special_tokens=True)),
        logprobs=None if logprobs is None else logprobs[: len(ids)],
        finish_reason="length" if end is None else "stop",
    )


def stop_ids(*candidates: Any) -> list[int]:
    """Give the first of some end-of-sequence settings (int, list or None) that says anything."""
    for found in candidates:
        if found is not None:
            return list(found) if isinstance(found, list) else [found]
    return []
