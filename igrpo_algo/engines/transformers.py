"""A sampler with `generate` of transformers: slow, exact, and available everywhere."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..rollouts.completions import Completion
from .distribution import Distribution
from .model_sampler import ModelSampler, check_numbers, cuts_of, logprobs_at, pad_left


class TransformersSampler(ModelSampler):
    """Draws completions with `model.generate`, together with their log-probs.

    The next token comes from softmax(logits / temperature), cut by `min_p`, `top_k` and `top_p`;
    the model's own generation config adds nothing. Log-probs are those of the whole vocabulary at
    the temperature, as a loss computes them, cut or not. A token is drawn as argmax(log p - log e)
    with e ~ Exp(1) (the exponential race). Each completion has a generator of its own: the same
    seed gives the same samples in any batch (up to rounding in the model), and torch's global
    generators stay as they are.

    Temperature 0 decodes greedily and gives no log-probs, since a ratio to a point mass means
    nothing.

    Prompts become token ids by `encode_prompt`, and none is ever cut. The stop token is the last of
    `token_ids` and is left out of `text`. The model samples in eval mode and gets its own mode
    back. Calls from several threads take turns.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        max_new_tokens: Maximum tokens of a completion.
        temperature: Divides the logits; 0 decodes greedily.
        top_p: Draws from the fewest tokens whose probabilities add up to this, in (0, 1].
        top_k: Draws from this many tokens; 0 from all.
        min_p: Draws from tokens of at least this share of the highest probability, in [0, 1].
        batch_size: Completions per call of `generate`.
        stop_token_ids: Tokens that end a completion; None takes all those of the model's generation
            config and the tokenizer's end of sequence.
        chat_template_kwargs: Passed to the chat template, for example {"enable_thinking": False}.

    Raises:
        ValueError: A number is out of range, or a cut is asked for at temperature 0.

    Examples:
        ```python
        sampler = TransformersSampler(model, tokenizer, max_new_tokens=64)
        sample_group(["2 + 2 ="], sampler, 4).texts
        ```
    """

    def _generate(self, rows: list[list[int]], seeds: list[int]) -> list[Completion]:
        device = self.model.device
        pad = self.tokenizer.pad_token_id or 0
        ids, mask = pad_left(rows, pad, device)
        race = None if self.distribution.is_greedy else _Race(seeds, self.distribution, device)
        # generate fills what a config leaves open from the model's own one: put a bare one there.
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            out = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([race or _Greedy()]),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=self.max_new_tokens,
                    eos_token_id=self.stop_token_ids or None,
                    pad_token_id=pad,
                ),
            )
        finally:
            self.model.generation_config = own
        drawn = out[:, ids.shape[1] :].tolist()
        logprobs = torch.stack(race.logprobs, dim=1).tolist() if race else [None] * len(rows)
        return [self._completion(*row) for row in zip(drawn, logprobs, strict=True)]


class _Greedy(LogitsProcessor):
    """Leaves the scores as they are, for `generate` to take the maximum."""

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        check_numbers(scores)
        return scores


class _Race(LogitsProcessor):
    """Draws each row's token with that row's generator; what it returns has its maximum there."""

    def __init__(self, seeds: list[int], distribution: Distribution, device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature = distribution.temperature
        self.cuts = cuts_of(distribution)
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        logprobs = logprobs_at(scores, self.temperature)
        waits = torch.empty_like(logprobs)
        for row, generator in zip(waits, self.generators, strict=True):
            row.exponential_(generator=generator)
        race = self.cuts(input_ids, logprobs) - waits.log()
        self.logprobs.append(logprobs.gather(-1, race.argmax(-1, keepdim=True)).squeeze(-1))
        return race
