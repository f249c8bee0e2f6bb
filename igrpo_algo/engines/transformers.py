"""A sampler over `generate` of transformers: slow, exact, and on every machine."""

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from igrpo_kernels.checks import check_count

from ..prompts import Prompt, decode_completion
from ..rollouts.completions import Completion
from ..rollouts.sampling import Groups
from ..seeds import derive_seed
from .base import EngineSampler, seeds_or_fresh, stop_ids
from .distribution import Distribution
from .weights import WantedWeights, Weights, open_weights


class TransformersSampler(EngineSampler):
    """Draws completions with `model.generate`, together with their log-probs.

    The next token comes from softmax(logits / temperature), cut by `min_p`, `top_k` and `top_p`;
    the model's own generation config adds nothing. Log-probs are those of the whole vocabulary at
    the temperature, as a loss computes them, cut or not. A token is drawn as argmax(log p - log e)
    with e ~ Exp(1) (the exponential race). Each completion has a generator of its own: the same
    seed gives the same samples in any batch (up to rounding in the model), and torch's global
    generators stay as they are.

    Temperature 0 decodes greedily and gives no log-probs: a ratio to a point mass means nothing.

    Prompts become token ids by `encode_prompt`, and none is ever cut. The stop token is the last of
    `token_ids`, and not in `text`. The model samples in eval mode and gets its own mode back. Calls
    from several threads take turns.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        max_new_tokens: Most tokens of a completion.
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

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        batch_size: int = 32,
        stop_token_ids: Sequence[int] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        distribution = Distribution(temperature, top_p, top_k, min_p)
        super().__init__(tokenizer, distribution, max_new_tokens, chat_template_kwargs)
        self.model = model
        self.batch_size = check_count("batch_size", batch_size)
        self.stop_token_ids = (
            stop_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
            if stop_token_ids is None
            else list(stop_token_ids)
        )
        config = model.config.get_text_config()
        self.take_context(getattr(config, "max_position_embeddings", sys.maxsize))
        self._lock = threading.Lock()

    def sample(
        self, prompts: Sequence[Prompt], n: int, *, seed: int | Sequence[int] | None = None
    ) -> Groups:
        """Draw n completions of each prompt.

        Args:
            prompts: P strings, lists of chat messages, or lists of token ids.
            n: Completions per prompt, at least 1.
            seed: One for all prompts, or one per prompt; None draws fresh ones from the system.

        Returns:
            P lists of n completions.

        Raises:
            ValueError: A prompt has no tokens, or more than `max_prompt_tokens`.
        """
        encoded = self.encode_all(prompts, n)
        seeds = seeds_or_fresh(seed, len(encoded))
        rows = [ids for ids in encoded for _ in range(n)]
        row_seeds = [derive_seed(seed, index) for seed in seeds for index in range(n)]
        completions: list[Completion] = []
        with self._lock, _sampling_mode(self.model):
            for start in range(0, len(rows), self.batch_size):
                batch = slice(start, start + self.batch_size)
                completions += self._generate(rows[batch], row_seeds[batch])
        return [completions[start : start + n] for start in range(0, len(rows), n)]

    def sync_weights(self, weights: Weights | str | Path) -> None:
        """Load new weights: all of them, or none.

        Names and shapes are compared before anything is written, so an error leaves the old weights
        whole. Tied weights may come under any of their names; under several, they must be equal.
        Values are cast to the model's dtype.

        Args:
            weights: A state dict, or a folder with `*.safetensors` files.

        Raises:
            FileNotFoundError: The folder holds no safetensors file.
            TypeError: `weights` is neither, or one of its values is not a whole tensor.
            ValueError: A weight is missing, unknown, or of another shape.
        """
        new = dict(open_weights(weights))  # read whole before the first is written
        with self._lock:
            own = self.model.state_dict()
            WantedWeights.of_state_dict(own).check(new)
            with torch.no_grad():
                for name, tensor in new.items():
                    own[name].copy_(tensor)

    def _generate(self, rows: list[list[int]], seeds: list[int]) -> list[Completion]:
        device = self.model.device
        pad = self.tokenizer.pad_token_id or 0
        width = max(len(row) for row in rows)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(width, device=device) >= width - lengths[:, None]
        race = None if self.distribution.is_greedy else _Race(seeds, self.distribution, device)
        # generate fills what a config leaves open from the model's own one: put a bare one there.
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            out = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask.long(),
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
        drawn = out[:, width:].tolist()
        logprobs = torch.stack(race.logprobs, dim=1).tolist() if race else [None] * len(rows)
        return [self._completion(*row) for row in zip(drawn, logprobs, strict=True)]

    def _completion(self, ids: list[int], logprobs: list[float] | None) -> Completion:
        stops = (i + 1 for i, token in enumerate(ids) if token in self.stop_token_ids)
        end = next(stops, None)
        ids = ids[:end]
        return Completion(
            token_ids=ids,
            text=decode_completion(ids, self.tokenizer),
            logprobs=None if logprobs is None else logprobs[: len(ids)],
            finish_reason="length" if end is None else "stop",
        )


class _Greedy(LogitsProcessor):
    """Leaves the scores as they are, for `generate` to take the maximum."""

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise ValueError("logits must be numbers, got nan: are the model's weights broken?")
        return scores


class _Race(LogitsProcessor):
    """Draws each row's token with that row's generator; what it returns has its maximum there."""

    def __init__(self, seeds: list[int], distribution: Distribution, device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature = distribution.temperature
        self.cuts = LogitsProcessorList()
        if distribution.min_p > 0:
            self.cuts.append(MinPLogitsWarper(distribution.min_p))
        if distribution.top_k > 0:
            self.cuts.append(TopKLogitsWarper(distribution.top_k))
        if distribution.top_p < 1:
            self.cuts.append(TopPLogitsWarper(distribution.top_p))
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        logprobs = (scores.float() / self.temperature).log_softmax(-1)
        waits = torch.empty_like(logprobs)
        for row, generator in zip(waits, self.generators, strict=True):
            row.exponential_(generator=generator)
        race = self.cuts(input_ids, logprobs) - waits.log()
        self.logprobs.append(logprobs.gather(-1, race.argmax(-1, keepdim=True)).squeeze(-1))
        return race


@contextmanager
def _sampling_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in eval mode; give each module its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
