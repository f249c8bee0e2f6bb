"""A sampler that runs a transformers model in this process, with any way of decoding."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from igrpo_kernels.checks import check_count

from ..prompts import Prompt, check_ids
from ..rollouts.completions import Completion, CompletionGroups
from ..seeds import derive_seed
from .base import EngineSampler, check_part, seeds_or_fresh, stop_ids
from .distribution import Distribution
from .weights import WantedWeights, Weights, open_weights


class ModelSampler(EngineSampler):
    """What the samplers with transformers models share: prompts, seeds, batches, stops and weights.

    A subclass says how a batch is decoded: `_generate`.

    Attributes:
        model: The causal language model.
        batch_size: Maximum completions decoded side by side.
        stop_token_ids: Tokens that end a completion.
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
        check_part("model", model, "generation_config")
        check_part("tokenizer", tokenizer, "eos_token_id")
        distribution = Distribution(temperature, top_p, top_k, min_p)
        super().__init__(tokenizer, distribution, max_new_tokens, chat_template_kwargs)
        self.model = model
        self.batch_size = check_count("batch_size", batch_size)
        self.stop_token_ids = (
            stop_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id)
            if stop_token_ids is None
            else list(check_ids("stop_token_ids", stop_token_ids))
        )
        config = model.config.get_text_config()
        self.take_context(getattr(config, "max_position_embeddings", sys.maxsize))
        self._lock = threading.Lock()

    def sample(
        self, prompts: Sequence[Prompt], n: int, *, seed: int | Sequence[int] | None = None
    ) -> CompletionGroups:
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
        """Draw one completion of each row's prompt, from the row's own seed."""
        raise NotImplementedError

    def _completion(self, ids: list[int], logprobs: list[float] | None) -> Completion:
        stops = (i + 1 for i, token in enumerate(ids) if token in self.stop_token_ids)
        end = next(stops, None)
        ids = ids[:end]
        return Completion.decoded(
            ids,
            self.tokenizer,
            logprobs=None if logprobs is None else logprobs[: len(ids)],
            finish_reason="length" if end is None else "stop",
        )


def pad_left(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Lay prompts side by side so that all end in the last column: ids and mask [B, T], int64."""
    width = max(len(row) for row in rows)
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def logprobs_at(logits: Tensor, temperature: float) -> Tensor:
    """Give log softmax(logits / T) of the whole vocabulary, as a loss computes it: float32."""
    return (logits.float() / temperature).log_softmax(-1)


def check_numbers(logits: Tensor) -> None:
    """Refuse NaN logits, which greedy decoding would take for the maximum."""
    if logits.isnan().any():
        raise ValueError("logits must be numbers, got nan: are the model's weights broken?")


def cuts_of(distribution: Distribution) -> Callable[[Any, Tensor], Tensor]:
    """Return processors that set the log-probs of tokens that cannot be drawn to -inf."""
    cuts: Any = LogitsProcessorList()
    if distribution.min_p > 0:
        cuts.append(MinPLogitsWarper(distribution.min_p))
    if distribution.top_k > 0:
        cuts.append(TopKLogitsWarper(distribution.top_k))
    if distribution.top_p < 1:
        cuts.append(TopPLogitsWarper(distribution.top_p))
    return cast(Callable[[Any, Tensor], Tensor], cuts)


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
