"""From a prompt to the token ids that a model sees, and from sampled tokens to text, in one place.

A prompt is a string, a list of chat messages, or a list of token ids. Sampling, training and
counting all use `encode_prompt`, so that they see the same ids; rewards and drafts read what
`decode_completion` returns. A tokenizer is anything with the interface of Hugging Face's.
"""

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from igrpo_kernels.checks import check_callable, check_list, describe

from .thinking import MARK_TOKENS

Prompt = str | list[dict[str, Any]] | list[int]

_SET_HERE = ("add_generation_prompt", "continue_final_message", "return_dict", "tokenize")


def encode_prompt(
    prompt: Prompt, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    r"""Return the token ids that a model sees for a prompt.

    - Token ids are taken as they are.
    - A string gets what the tokenizer puts before it (a BOS token, if it has one), and nothing
      after it: a model does not continue a prompt that ends with an end-of-sequence token.
    - Chat messages go through the tokenizer's chat template. If the last one is the assistant's, it
      is left open and the model continues it; otherwise the template opens the assistant's turn.

    Args:
        prompt: A string, a list of chat messages, or a list of token ids.
        tokenizer: The model's tokenizer.
        chat_template_kwargs: Passed to the chat template: {"enable_thinking": False}, say. They
            have no effect on strings and token ids.

    Returns:
        The ids.

    Raises:
        TypeError: The prompt is neither a string, nor messages, nor token ids.
        ValueError: The template leaves out the assistant's message that the model should continue.

    Examples:
        >>> class Bytes:
        ...     eos_token_id = 0
        ...     def __call__(self, text, add_special_tokens=True):
        ...         return {"input_ids": [*text.encode(), *[0] * add_special_tokens]}
        >>> encode_prompt("hi", Bytes()), encode_prompt([104, 105], Bytes())
        ([104, 105], [104, 105])
    """
    kwargs = check_chat_template_kwargs(chat_template_kwargs)
    if isinstance(prompt, str):
        return _encode_text(prompt, check_callable("tokenizer", tokenizer))
    if not isinstance(prompt, list) or not prompt:
        raise TypeError(f"prompt must be a string or a non-empty list, got {describe(prompt)}")
    if not isinstance(prompt[0], Mapping):
        return list(check_ids("prompt", prompt))
    is_open = prompt[-1].get("role") == "assistant"
    ids = tokenizer.apply_chat_template(
        prompt,
        add_generation_prompt=not is_open,
        continue_final_message=is_open,
        tokenize=True,
        return_dict=False,
        **kwargs,
    )
    return list(ids)


def copy_prompt(prompt: Prompt) -> Prompt:
    """Copy a prompt, for a sampler that may change what it gets. Ids are copied as one list."""
    is_ids = isinstance(prompt, list) and set(map(type, prompt)) <= {int}
    return list(prompt) if is_ids else deepcopy(prompt)  # type: ignore[return-value]


def decode_completion(ids: Sequence[int], tokenizer: Any) -> str:
    """Return the text of a completion, without special tokens but with thinking marks.

    Some tokenizers make "<think>" and "</think>" special tokens. Without them, rewards and
    `strip_thinking` would take the thinking for the answer.

    Args:
        ids: The tokens drawn.
        tokenizer: The model's tokenizer.

    Returns:
        The text.
    """
    check_ids("ids", ids)
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TypeError(f"tokenizer must be one of transformers, got {describe(tokenizer)}")
    # Looking up the few distinct tokens drawn is cheaper than looking up every mark.
    if MARK_TOKENS.isdisjoint(tokenizer.convert_ids_to_tokens(list(set(ids)))):
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    added = tokenizer.added_tokens_decoder.items()
    hidden = {token for token, entry in added if entry.special and entry.content not in MARK_TOKENS}
    return str(tokenizer.decode([token for token in ids if token not in hidden]))


def check_entries(name: str, value: Any, kinds: tuple[type, ...], what: str) -> None:
    """Raise TypeError unless `value` is a list of these types; a bool is not a number."""
    for kind in set(map(type, check_list(name, value))):
        if kind is bool or not issubclass(kind, kinds):
            place = next(place for place, each in enumerate(value) if type(each) is kind)
            raise TypeError(f"{name}[{place}] must be {what}, got {describe(value[place])}")


def check_ids(name: str, value: Any) -> Any:
    """Return token ids if they are a list of int, none of them negative.

    Raises:
        TypeError: They are not a list (or a tuple) of int.
        ValueError: One is negative, or takes more than 64 bits.
    """
    check_entries(name, value, (int,), "an int")
    if value and not 0 <= min(value) <= max(value) < 2**63:
        wrong = min(value) if min(value) < 0 else max(value)
        raise ValueError(f"{name} must lie in [0, 2**63), got {describe(wrong)}")
    return value


def check_prompts(prompts: object) -> list[Prompt]:
    """Return the prompts as a list; name the first one that is not a prompt.

    Raises:
        TypeError: They are not a list, or one is of another type than a prompt.
        ValueError: The text of one cannot be encoded.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a list of prompts, got {describe(prompts)}")
    for index, prompt in enumerate(prompts):
        try:
            half = _lone_surrogate(prompt)
        except RecursionError:
            raise ValueError(f"prompts[{index}] is nested too deeply") from None
        if half:
            raise ValueError(
                f"prompts[{index}] holds {half!r}, half of a character, which no tokenizer takes"
            )
        if isinstance(prompt, str):
            continue
        if isinstance(prompt, list) and prompt:
            if all(isinstance(message, Mapping) for message in prompt):
                continue
            if all(isinstance(token, int) for token in prompt):
                continue
        raise TypeError(
            f"prompts[{index}] must be a string, or a non-empty list of chat messages or of token "
            f"ids, got {describe(prompt)}"
        )
    return list(prompts)


def check_chat_template_kwargs(value: object) -> dict[str, Any]:
    """Return the arguments for the chat template, unless they set what `encode_prompt` sets.

    Raises:
        TypeError: It is neither a mapping nor None.
        ValueError: It sets what `encode_prompt` sets.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"chat_template_kwargs must be a mapping, got {describe(value)}")
    if taken := sorted(value.keys() & set(_SET_HERE)):
        raise ValueError(f"chat_template_kwargs must not set {', '.join(taken)}: each prompt does")
    return dict(value)


def _encode_text(text: str, tokenizer: Any) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    end = tokenizer.eos_token_id
    if end is None or ids[-1:] != [end]:
        return ids
    # The last one is the text's own, or the tokenizer's post-processor has added it.
    own = _count_last(list(tokenizer(text, add_special_tokens=False)["input_ids"]), end)
    return ids[: len(ids) - (_count_last(ids, end) - own)]


def _count_last(ids: list[int], token: int) -> int:
    """Count how often a token stands at the end of a list."""
    count = 0
    while count < len(ids) and ids[-1 - count] == token:
        count += 1
    return count


def _lone_surrogate(prompt: object) -> str | None:
    """Find half of a surrogate pair in a prompt's texts, which broken JSON escapes leave behind."""
    if isinstance(prompt, str):
        found = re.search("[\ud800-\udfff]", prompt)
        return None if found is None else found[0]
    if isinstance(prompt, Mapping):
        prompt = list(prompt.values())
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return next(filter(None, map(_lone_surrogate, prompt)), None)
    return None
