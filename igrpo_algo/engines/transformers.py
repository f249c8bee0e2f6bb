"""A sampler over `generate` of transformers: slow, exact, and at home on every machine."""

import secrets
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
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)

from igrpo_kernels.checks import check_count, check_number

from ..prompts import Prompt, decode_completion
from ..rollouts.completions import Completion
from ..rollouts.sampling import Groups
from ..seeds import derive_seed, prompt_seeds
from .base import EngineSampler, stop_ids
from .weights import WantedWeights, Weights, open_weights


class TransformersSampler(EngineSampler):
    """Draws completions with `model.generate`, each with the log-probs it was drawn at.

    The distribution of the next token is softmax(logits / temperature), cut to the nucleus
    `top_p` and normalized again; nothing else is applied, whatever the model's own generation
    config asks for. A token is drawn as argmax(log p - log e) with e ~ Exp(1) (the exponential
    race), from one generator per completion: seeds give the same samples in whatever batch a
    prompt stands (up to rounding in the model), and torch's global generators are not touched.

    Temperature 0 is greedy decoding. Its distribution is a point mass, so `logprobs` is None:
    a ratio against it means nothing.

    Chat messages go through the tokenizer's chat template with a generation prompt; strings are
    tokenized with the tokenizer's special tokens; token ids are taken as they are. The stop token
    is the last of `token_ids`, and not in `text`. The model samples in eval mode, and every
    module's mode is restored. Calls from several threads take turns.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        max_new_tokens: Most tokens of a completion.
        temperature: Divides the logits; 0 decodes greedily.
        top_p: Probability mass of the nucleus, in (0, 1].
        batch_size: Completions per call of `generate`.
        stop_token_ids: Tokens that end a completion; None takes all those of the model's generation
            config and the tokenizer's end of sequence.
        chat_template_kwargs: Passed to the chat template: {"enable_thinking": False}, say.

    Raises:
        ValueError: A number is out of range, or `top_p` is given at temperature 0.

    Examples:
        `sample_group(["2 + 2 ="], TransformersSampler(model, tokenizer, max_new_tokens=64), 4)`
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = 32,
        stop_token_ids: Sequence[int] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, max_new_tokens, chat_template_kwargs)
        self.model = model
        self.temperature = check_number("temperature", temperature, at_least=0)
        self.top_p = check_number("top_p", top_p, above=0, at_most=1)
        self.batch_size = check_count("batch_size", batch_size)
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError(f"top_p has no effect at temperature 0, got {top_p}")
        self.stop_token_ids = (
            stop_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
            if stop_token_ids is None
            else list(stop_token_ids)
        )
        context: int = model.config.get_text_config().max_position_embeddings
        self.max_prompt_tokens = context - self.max_new_tokens
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
        seeds = prompt_seeds(secrets.randbits(63) if seed is None else seed, len(encoded))
        assert seeds is not None
        rows = [ids for ids in encoded for _ in range(n)]
        row_seeds = [derive_seed(seed, index) for seed in seeds for index in range(n)]
        completions: list[Completion] = []
        with self._lock, _sampling_mode(self.model):
            for start in range(0, len(rows), self.batch_size):
                batch = slice(start, start + self.batch_size)
                completions += self._generate(rows[batch], row_seeds[batch])
        return [completions[start : start + n] for start in range(0, len(rows), n)]

    def sync_weights(self, weights: Weights | str | Path) -> None:
        """Take over weights, all of them or none.

        Names and shapes are compared before anything is written: on an error the old weights are
        whole. Tied weights may come under each of their names or under one; under several they
        must be equal. Values are cast to the model's dtype.

        Args:
            weights: A state dict, or a folder with `*.safetensors` files.

        Raises:
            FileNotFoundError: The folder holds no safetensors file.
            TypeError: `weights` is neither, or a value of it is no whole tensor.
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
        race = None if self.temperature == 0 else _Race(seeds, self.temperature, self.top_p, device)
        # generate fills what a config leaves open from the model's own one: put a bare one there.
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            out = self.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask.long(),
                logits_processor=LogitsProcessorList([race] if race else []),
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


class _Race(LogitsProcessor):
    """Draws each row's token with that row's generator; what it returns has its maximum there."""

    def __init__(
        self, seeds: list[int], temperature: float, top_p: float, device: torch.device
    ) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float() / self.temperature
        if self.nucleus is not None:
            logits = self.nucleus(input_ids, logits)
        logprobs = logits.log_softmax(-1)
        waits = torch.empty_like(logprobs)
        for row, generator in zip(waits, self.generators, strict=True):
            row.exponential_(generator=generator)
        race = logprobs - waits.log()
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
