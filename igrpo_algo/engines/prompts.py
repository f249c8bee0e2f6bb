"""What the samplers do alike: prompts to token ids, seeds to requests."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from igrpo_kernels.checks import check_count

from ..rollouts.sampling import Prompt, check_prompts, derive_seed


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


class Encoder(Protocol):
    """The part of a sampler that says what a prompt is to its model."""

    max_new_tokens: int

    @property
    def max_prompt_tokens(self) -> int:
        """Most tokens a prompt may have."""
        ...

    def encode(self, prompt: Prompt) -> list[int]:
        """Give the token ids that the model sees for a prompt."""
        ...


def encode_all(sampler: Encoder, prompts: Sequence[Prompt], n: int) -> list[list[int]]:
    """Encode the prompts of a call, each checked: nothing is ever cut.

    Raises:
        TypeError: `prompts` is no list of prompts, or `n` no int.
        ValueError: A prompt has no tokens or too many, or `n` is below 1.
    """
    check_count("n", n)
    encoded = [sampler.encode(prompt) for prompt in check_prompts(prompts)]
    for index, ids in enumerate(encoded):
        if not 0 < len(ids) <= sampler.max_prompt_tokens:
            raise ValueError(
                f"prompts[{index}] has {len(ids)} tokens, wanted 1 to {sampler.max_prompt_tokens} "
                f"(the model's context less max_new_tokens = {sampler.max_new_tokens})"
            )
    return encoded


def request_seed(seed: int) -> int:
    """Give the seed of a prompt's request to vLLM, which adds i for the i-th completion."""
    return derive_seed(seed, 0) >> 1


def stop_ids(*candidates: Any) -> list[int]:
    """Give the first of some end-of-sequence settings (int, list or None) that says anything."""
    for found in candidates:
        if found is not None:
            return list(found) if isinstance(found, list) else [found]
    return []
