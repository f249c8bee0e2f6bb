"""Decoding with static caches: the state of a batch is all tensors, so that a graph can replay it.

Prompts are padded on the left, so that all rows write the same slot of the cache at the same time.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer


@dataclass(frozen=True)
class Prompts:
    """D distinct prompts, run through the model once.

    Attributes:
        cache: Their keys and values in W slots: a `Cache` of transformers.
        mask: 0 left of a prompt, 1 in it. Shape [D, W], int64.
        logits: Of the token that follows each. Shape [D, V].
    """

    cache: Any
    mask: Tensor
    logits: Tensor

    @classmethod
    def run(cls, model: PreTrainedModel, ids: Tensor, mask: Tensor) -> "Prompts":
        """Fill a cache with prompts [D, W] that are padded on the left."""
        cache = DynamicCache()  # without a config: whole layers, where windows slide too
        last_only = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}  # type: ignore[operator]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{cache_argument(type(model).forward): cache},
            **last_only,
        )
        return cls(cache, mask, out.logits[:, -1])


@dataclass(frozen=True)
class Decoding:
    """The state of B rows that are decoded side by side, at most T tokens each.

    Every step changes these tensors in place and reads none of them back.

    Attributes:
        cache: Keys and values in S slots per row: a `Cache` of transformers.
        drawn: How many tokens each row has. Shape [1].
        mask: 1 in the slots of the prompt and of what was drawn, 0 in others. Shape [B, S].
        position: Of the next token. Shape [B].
        token: The last one drawn. Shape [B].
        noise: What decides each draw. Shape [B, T], float64, in [0, 1).
        ids: The tokens drawn. Shape [B, T].
        logprobs: Theirs. Shape [B, T], float32.
        ended: Whether a stop token was drawn. Shape [B].
        stops: The stop tokens. Shape [number of them].
    """

    cache: Any
    drawn: Tensor
    mask: Tensor
    position: Tensor
    token: Tensor
    noise: Tensor
    ids: Tensor
    logprobs: Tensor
    ended: Tensor
    stops: Tensor

    @classmethod
    def room(
        cls, prompts: Prompts, rows: int, slots: int, tokens: int, stops: list[int]
    ) -> "Decoding":
        """Make a state of so many rows, slots and tokens for prompts of this model."""
        device = prompts.mask.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            cache=Cache(layers=[_room(layer, rows, slots) for layer in prompts.cache.layers]),
            drawn=zeros(1),
            mask=zeros(rows, slots),
            position=zeros(rows),
            token=zeros(rows),
            noise=zeros(rows, tokens, dtype=torch.float64),
            ids=zeros(rows, tokens),
            logprobs=zeros(rows, tokens, dtype=torch.float32),
            ended=zeros(rows, dtype=torch.bool),
            stops=torch.tensor(stops, dtype=torch.int64, device=device),
        )

    def start(self, prompts: Prompts, which: Tensor, noise: Tensor) -> None:
        """Put prompt number `which[b]` in row b. Rows without noise have ended.

        Args:
            prompts: Distinct ones.
            which: Shape [B], int64.
            noise: Of the rows that are wanted. Shape [at most B, T].
        """
        wanted, width = len(noise), prompts.mask.shape[1]
        self.drawn.zero_()
        self.mask.zero_()
        self.mask[:, :width] = prompts.mask[which]
        self.position.copy_(prompts.mask.sum(-1)[which])
        self.noise[:wanted] = noise
        self.ended[:wanted] = False
        self.ended[wanted:] = True
        for own, given in zip(self.cache.layers, prompts.cache.layers, strict=True):
            own.reset()  # a NaN that an earlier batch left would get past any mask: 0 * NaN is NaN
            own.keys[:, :, :width] = given.keys[which]
            own.values[:, :, :width] = given.values[which]
            own.cumulative_length.fill_(width)

    def append(self, token: Tensor, logprob: Tensor) -> None:
        """Write one more token of each row."""
        self.ids.index_copy_(1, self.drawn, token[:, None])
        self.logprobs.index_copy_(1, self.drawn, logprob[:, None])
        self.ended.logical_or_((token[:, None] == self.stops).any(-1))
        self.token.copy_(token)
        self.drawn.add_(1)

    def noise_now(self) -> Tensor:
        """Return what decides the next draw of each row. Shape [B]."""
        return self.noise.index_select(1, self.drawn).squeeze(1)

    def forward(self, model: PreTrainedModel) -> Tensor:
        """Run the model on the last tokens; give the logits of the next ones. Shape [B, V]."""
        slot = self.cache.layers[0].cumulative_length.view(1)  # the one that is written now
        self.mask.index_fill_(1, slot, 1)
        out = model(
            input_ids=self.token[:, None],
            attention_mask=self.mask,
            position_ids=self.position[:, None],
            use_cache=True,
            **{cache_argument(type(model).forward): self.cache},
        )
        self.position.add_(1)
        return out.logits[:, -1]

    def keep(self, rows: Tensor) -> "Decoding":
        """Go on with these rows only, in memory of their own."""
        layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        names = ("mask", "position", "token", "noise", "ids", "logprobs", "ended")
        kept = {name: getattr(self, name)[rows] for name in names}
        return replace(self, cache=Cache(layers=layers), **kept)


@functools.cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the name under which a model takes its cache: transformers 5.24 changed it."""
    arguments = inspect.signature(forward).parameters
    return "cache" if "cache" in arguments else "past_key_values"


def _room(like: Any, rows: int, slots: int) -> StaticLayer:
    """Make a static cache layer with the heads and widths of `like`."""
    layer = StaticLayer(slots)
    shapes = [(rows, each.shape[1], 0, each.shape[3]) for each in (like.keys, like.values)]
    layer.lazy_initialization(like.keys.new_empty(shapes[0]), like.values.new_empty(shapes[1]))
    return layer


def draw(logprobs: Tensor, noise: Tensor) -> Tensor:
    """Draw a token from each row: the first whose cumulative probability exceeds its noise.

    token = min{v : F(v) > u F(V)}, F the cumulative sum of p in float64: a number per row decides,
    so that all the noise of a batch can be drawn before it, each row's by a generator of its own.

    Args:
        logprobs: Shape [B, V]; -inf where a token cannot be drawn. They need not be normalized.
        noise: u. Shape [B], float64, in [0, 1).

    Returns:
        The tokens. Shape [B], int64; any, where a log-prob is NaN.

    Examples:
        >>> logprobs = torch.tensor([[0.5, 0.0, 0.5]]).log().expand(3, 3)
        >>> draw(logprobs, torch.tensor([0.0, 0.49, 0.5], dtype=torch.float64))
        tensor([0, 0, 2])
    """
    mass = logprobs.double().exp_().cumsum(-1)
    token = torch.searchsorted(mass, noise[:, None] * mass[:, -1:], right=True)
    return token.squeeze(-1).clamp_(max=logprobs.shape[-1] - 1)


def noise_of(seeds: list[int], tokens: int) -> Tensor:
    """Draw uniform numbers from each seed, the same on every device. Shape [B, T]."""
    return torch.stack(
        [
            torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
    )


def can_capture(model: PreTrainedModel) -> bool:
    """Whether the model is where CUDA graphs are."""
    return model.device.type == "cuda"


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture a step in a CUDA graph; give what replays it.

    Raises:
        RuntimeError: The step waits for the device, say, or autocast is on: it would keep copies of
            the weights, which the graph would read after the weights have changed.
    """
    if torch.is_autocast_enabled(device.type):
        raise RuntimeError("autocast is on")
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # what libraries allocate at first use is not captured
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    return graph.replay
