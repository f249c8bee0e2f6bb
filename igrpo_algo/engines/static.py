"""A sampler with static caches: transformers models at nearly the decoding speed of an engine."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from igrpo_kernels.checks import check_flag

from ..rollouts.completions import Completion
from .decoding import Decoding, Prompts, can_capture, capture, draw, noise_of
from .model_sampler import ModelSampler, check_numbers, cuts_of, logprobs_at, pad_left

CACHED_LAYERS = {"full_attention", "sliding_attention"}
SLOT_STEP = 64  # slots of a captured cache come in this many, so that few calls need a larger one
CHECK_STEPS = 8  # on a GPU, tokens between two looks at which rows have ended: looking waits for it


class StaticSampler(ModelSampler):
    """Draws completions over caches of fixed size, on a GPU by replaying a CUDA graph per token.

    What it draws from, its log-probs, stops, prompts and modes are those of `TransformersSampler`,
    and so are its options. It differs in how it decodes:

    - Each distinct prompt of a batch goes through the model once; its keys and values are copied to
      its rows.
    - On a GPU a step is captured once and replayed for every token, whatever the prompts; it is
      captured again when a batch needs more room, or when the weights have moved to other memory.
      It reads the weights where they are, so an optimizer step or `sync_weights` is seen at once.
      If a step cannot be captured, a warning says why, and decoding continues without a graph.
    - Without a graph, rows that have ended are dropped whenever a quarter has.
    - A token is drawn as the first whose cumulative probability exceeds u. Each completion has its
      own u's, drawn on the CPU before the batch begins: the same seed gives the same samples in any
      batch and on any device (up to rounding in the model). `TransformersSampler` gives others.

    Layers with a sliding window keep the whole sequence, which costs memory and changes nothing.

    Args:
        model: A causal language model whose layers are all attention: the trained one itself, or a
            copy that gets its weights by `sync_weights`.
        tokenizer: Its tokenizer.
        max_new_tokens: Maximum tokens of a completion.
        batch_size: Completions that are decoded side by side. A graph keeps the keys and values of
            the largest batch there was.
        cuda_graph: False never captures a graph. Without CUDA there is none.
        **options: `temperature`, `top_p`, `top_k`, `min_p`, `stop_token_ids` and
            `chat_template_kwargs`, as `TransformersSampler` takes them.

    Raises:
        ValueError: A number is out of range, a cut is asked for at temperature 0, or the model
            has layers other than attention.

    Examples:
        ```python
        sampler = StaticSampler(model, tokenizer, max_new_tokens=64, batch_size=256)
        sample_group(["2 + 2 ="], sampler, 4).texts
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        batch_size: int = 32,
        cuda_graph: bool = True,
        **options: Any,
    ) -> None:
        check_flag("cuda_graph", cuda_graph)
        super().__init__(
            model, tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size, **options
        )
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
        if others := sorted(kinds - CACHED_LAYERS) or (["a state"] if model._is_stateful else []):
            raise ValueError(
                f"model must have layers of attention only, got {', '.join(others)} in "
                f"{type(model).__name__}: TransformersSampler takes it"
            )
        self._cuts = cuts_of(self.distribution)
        self._uses_graph = cuda_graph and max_new_tokens > 1 and can_capture(model)
        self._captured: _Captured | None = None

    @torch.no_grad()
    def _generate(self, rows: list[list[int]], seeds: list[int]) -> list[Completion]:
        device = self.model.device
        number = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, rows)))}
        pad = self.tokenizer.pad_token_id or 0
        prompts = Prompts.run(self.model, *pad_left(list(number), pad, device))
        state, step = self._make_ready(prompts, len(rows))
        numbers = [number[tuple(row)] for row in rows] + [0] * (len(state.token) - len(rows))
        which = torch.tensor(numbers, device=device)
        state.start(prompts, which, noise_of(seeds, self.max_new_tokens).to(device))
        self._draw(state, prompts.logits[which])
        done: dict[int, Completion] = {}
        owner = torch.arange(len(rows))
        check = 1 if device.type == "cpu" else CHECK_STEPS
        for drawn in range(1, self.max_new_tokens):
            if drawn % check == 0:
                ended = state.ended[: len(owner)].cpu()
                if ended.all():
                    break
                if step is None and 4 * ended.sum() >= len(ended):
                    done |= self._completions(state, owner, ended)
                    state = state.keep((~ended).nonzero().squeeze(1).to(device))
                    owner = owner[~ended]
            self._step(state) if step is None else step()
        done |= self._completions(state, owner, torch.ones_like(owner, dtype=torch.bool))
        return [done[row] for row in range(len(rows))]

    def _step(self, state: Decoding) -> None:
        self._draw(state, state.forward(self.model))

    def _draw(self, state: Decoding, logits: Tensor) -> None:
        if self.distribution.is_greedy:
            state.append(logits.argmax(-1), logits.amax(-1).float())
            return
        logprobs = logprobs_at(logits, self.distribution.temperature)
        token = draw(self._cuts(state.ids, logprobs), state.noise_now())
        state.append(token, logprobs.gather(-1, token[:, None]).squeeze(-1))

    def _completions(self, state: Decoding, owner: Tensor, chosen: Tensor) -> dict[int, Completion]:
        """Read the chosen rows; give the completion of each by the number of its prompt's row."""
        drawn = int(state.drawn)
        rows = chosen.nonzero().squeeze(1).to(state.ids.device)
        ids = state.ids[rows, :drawn].tolist()
        logprobs: Sequence[Any] = state.logprobs[rows, :drawn].tolist()
        if self.distribution.is_greedy:
            check_numbers(state.logprobs[rows, :drawn])
            logprobs = [None] * len(ids)
        numbers = owner[chosen].tolist()
        return {
            number: self._completion(*row)
            for number, *row in zip(numbers, ids, logprobs, strict=True)
        }

    def _make_ready(
        self, prompts: Prompts, rows: int
    ) -> tuple[Decoding, Callable[[], None] | None]:
        """Return a state with room for a batch, and what replays its step if there is a graph."""
        slots = prompts.mask.shape[1] + self.max_new_tokens
        make = partial(
            Decoding.room, prompts, tokens=self.max_new_tokens, stops=self.stop_token_ids
        )
        if not self._uses_graph:
            return make(rows=rows, slots=slots), None
        weights = chain(self.model.parameters(), self.model.buffers())
        addresses = [weight.data_ptr() for weight in weights]
        old = self._captured
        if old is not None and old.addresses == addresses and old.has_room(rows, slots):
            return old.state, old.replay
        if old is not None:
            rows, slots = max(rows, old.state.mask.shape[0]), max(slots, old.state.mask.shape[1])
        self._captured = old = None  # frees its memory before more is taken
        state = make(rows=rows, slots=-(-slots // SLOT_STEP) * SLOT_STEP)
        try:
            replay = capture(partial(self._step, state), self.model.device)
        except Exception as error:
            self._uses_graph = False
            torch.cuda.synchronize(self.model.device)
            warnings.warn(
                "StaticSampler decodes without a CUDA graph, and slower: the step could not be "
                f"captured ({type(error).__name__}: {error})",
                stacklevel=4,
            )
            return make(rows=rows, slots=slots), None
        self._captured = _Captured(state, replay, addresses)
        return state, replay


@dataclass(frozen=True)
class _Captured:
    """A graph, with the state and the weights that it reads and writes."""

    state: Decoding
    replay: Callable[[], None]
    addresses: list[int]

    def has_room(self, rows: int, slots: int) -> bool:
        return rows <= self.state.mask.shape[0] and slots <= self.state.mask.shape[1]
