"""What all samplers share: from prompts to token ids."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from igrpo_kernels.checks import check_count, describe

from ..drafts.markers import marker_tokens
from ..prompts import Prompt, check_chat_template_kwargs, check_prompts, encode_prompt
from ..seeds import derive_seed, prompt_seeds
from .distribution import Distribution


class EngineSampler:
    """A sampler that renders and tokenizes prompts itself, so that all engines see the same ids.

    Attributes:
        tokenizer: The model's tokenizer.
        distribution: What each token is drawn from.
        chat_template_kwargs: Passed to its chat template.
        max_new_tokens: Maximum tokens of a completion.
        max_prompt_tokens: Maximum tokens of a prompt, so that `max_new_tokens` still fit the
            model's context.
    """

    max_prompt_tokens: int

    def __init__(
        self,
        tokenizer: Any,
        distribution: Distribution,
        max_new_tokens: int,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.distribution = distribution
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        self.chat_template_kwargs = check_chat_template_kwargs(chat_template_kwargs)

    @property
    def control_tokens(self) -> frozenset[str]:
        """The strings that begin or end a turn of this model; a draft must not contain them."""
        template = self.chat_template_kwargs.get("chat_template")
        return frozenset(marker_tokens(self.tokenizer, template))

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids that the model sees for a prompt. See `encode_prompt`."""
        return encode_prompt(prompt, self.tokenizer, self.chat_template_kwargs)

    def encode_all(self, prompts: Sequence[Prompt], n: int) -> list[list[int]]:
        """Encode the prompts of a call and check each: nothing is ever cut.

        Raises:
            TypeError: `prompts` is not a list of prompts, or `n` not an int.
            ValueError: A prompt has no tokens or too many, or `n` is below 1.
        """
        check_count("n", n)
        encoded = [self.encode(prompt) for prompt in check_prompts(prompts)]
        for index, ids in enumerate(encoded):
            if not 0 < len(ids) <= self.max_prompt_tokens:
                raise ValueError(
                    f"prompts[{index}] has {len(ids)} tokens, wanted 1 to {self.max_prompt_tokens} "
                    f"(the model's context less max_new_tokens = {self.max_new_tokens})"
                )
        return encoded

    def take_context(self, context: int) -> None:
        """Store the length of the model's context, and check that a prompt fits in it."""
        self.max_prompt_tokens = context - self.max_new_tokens
        if self.max_prompt_tokens < 1:
            raise ValueError(
                f"max_new_tokens = {self.max_new_tokens} leaves no room for a prompt in the "
                f"model's context of {context} tokens"
            )


def check_part(name: str, value: Any, part: str) -> None:
    """Raise TypeError unless a model or a tokenizer has the part of transformers' that is read."""
    if not hasattr(value, part):
        raise TypeError(f"{name} must be one of transformers, got {describe(value)}")


def seed_or_fresh(seed: int | None) -> int:
    """Return the seed, or a fresh one from the system if there is none."""
    return secrets.randbits(63) if seed is None else seed


def seeds_or_fresh(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Return a seed for each of `count` prompts, fresh ones from the system if there is none."""
    return prompt_seeds(secrets.randbits(63) if seed is None else seed, count) or []


def request_seed(seed: int) -> int:
    """Return the seed of a prompt's request to vLLM, which adds i for the i-th completion."""
    return derive_seed(seed, 0) >> 1


def stop_ids(*settings: Any) -> list[int]:
    """Collect the tokens that end-of-sequence settings (int, list or None) name.

    In a base model, the generation config names the end of a text and the tokenizer that of a turn:
    both end a completion.
    """
    listed = (each if isinstance(each, list) else [each] for each in settings if each is not None)
    return list(dict.fromkeys(token for each in listed for token in each))
