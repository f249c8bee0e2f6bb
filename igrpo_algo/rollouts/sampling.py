"""Samplers draw completions; their small protocol, and `sample_group`, which checks it.

A prompt is a string, a list of chat messages, or a list of token ids. A sampler is any of

- an object with `sample(prompts, n, *, seed=None)`, which returns n completions per prompt;
- an object with `async sample_one(prompt, n, *, seed=None)`, which returns n of one prompt;
- an object with both (then each caller uses the form that suits it);
- a function `(prompts, n, seed)`, called by position, that returns what `sample` does.

An object with `sample_one` may also have `stream_one(prompt, n, *, seed=None)`, an asynchronous
generator of the same completions as (position, completion), each as soon as it is done. A streamed
rollout then lends the place of a finished completion to the next prompt.

`sample` and the function may be coroutine functions too. Seeds are one int per prompt, or None.

An object may have `encode(prompt)`, which gives the token ids that its model sees for a prompt. It
then gets these ids in place of prompts, and records keep them: what was sampled from is what is
trained on. It may have `control_tokens`, the strings that a draft must not hold.
If its `takes_priority` is true, `sample_one` and `stream_one` also get `priority`, the number of
the stage: lower goes first.
"""

import asyncio
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from igrpo_kernels.checks import check_count, describe

from ..fields import check_fields
from ..prompts import Prompt, check_ids, check_prompts, copy_prompt
from ..seeds import prompt_seeds
from .completions import (
    Completion,
    CompletionGroups,
    Packed,
    Padded,
    check_groups,
    pack_completions,
    pad_completions,
)

Result = TypeVar("Result")


class Sampler(Protocol):
    """Draws completions of many prompts at once."""

    def sample(
        self, prompts: Sequence[Prompt], n: int, *, seed: int | Sequence[int] | None = None
    ) -> CompletionGroups:
        """Return n completions for each prompt; the same seed returns the same ones."""
        ...


class AsyncSampler(Protocol):
    """Draws completions of one prompt without blocking; cancelling the call frees the engine."""

    async def sample_one(
        self, prompt: Prompt, n: int, *, seed: int | None = None
    ) -> list[Completion]:
        """Return n completions of the prompt; the same seed returns the same ones."""
        ...


SamplerFunction = Callable[
    [Sequence[Prompt], int, Sequence[int] | None], CompletionGroups | Awaitable[CompletionGroups]
]
AnySampler = Sampler | AsyncSampler | SamplerFunction


@dataclass(frozen=True)
class Samples:
    """The completions of each prompt, prompt-major.

    Attributes:
        prompts: The P prompts.
        completions: Their completions: P lists, of n each where nothing was skipped.
        prompt_ids: The prompts as the sampler's `encode` rendered them, and as they were sampled
            from; None for each prompt where the sampler has no `encode`.

    Examples:
        >>> drawn = [[Completion([7, 1], "2"), Completion([8], "3")]]
        >>> samples = Samples(["1 + 1?"], drawn, [[4, 5, 4]])
        >>> samples.texts, samples.packed().cu_seqlens
        ([['2', '3']], tensor([0, 2, 3], dtype=torch.int32))
    """

    prompts: list[Prompt]
    completions: CompletionGroups
    prompt_ids: list[list[int] | None]

    def __post_init__(self) -> None:
        check_fields(self)
        sizes = len(self.prompts), len(self.completions), len(self.prompt_ids)
        if len(set(sizes)) > 1:
            raise ValueError(f"prompts, completions and prompt_ids must be as many, got {sizes}")

    @property
    def texts(self) -> list[list[str]]:
        """Text of each completion, P lists of n."""
        return [[completion.text for completion in group] for group in self.completions]

    @property
    def flat(self) -> list[Completion]:
        """All completions, those of one prompt next to each other; B = P * n."""
        return [completion for group in self.completions for completion in group]

    @property
    def owner(self) -> Tensor:
        """Index of the prompt that each of `flat` belongs to. Shape [B], int64."""
        sizes = torch.tensor([len(group) for group in self.completions], dtype=torch.int64)
        return torch.repeat_interleave(torch.arange(len(self.completions)), sizes)

    def padded(self, *, pad_token_id: int = 0) -> Padded:
        """Token ids, mask and sampler log-probs in the padded layout [B, T]."""
        return pad_completions(self.flat, pad_token_id=pad_token_id)

    def packed(self) -> Packed:
        """Token ids, offsets and sampler log-probs in the packed layout [L]."""
        return pack_completions(self.flat)


def sample_group(
    prompts: Sequence[Prompt],
    sampler: AnySampler,
    n: int,
    *,
    seed: int | Sequence[int] | None = None,
) -> Samples:
    """Draw n completions of each prompt.

    The sampler gets one seed per prompt, `derive_seed(seed, p)`, so that a prompt's samples do not
    depend on its neighbors; no prompts give no samples, and the sampler is not called. May be
    called inside a running event loop (a notebook): an asynchronous sampler then runs in a thread
    of its own.

    Args:
        prompts: P prompts: strings, lists of chat messages, or lists of token ids.
        sampler: One of the forms in the module's docstring.
        n: Completions per prompt, at least 1.
        seed: One for all prompts, or P of them; None leaves the seeds to the sampler.

    Returns:
        The completions, prompt-major.

    Raises:
        TypeError: A prompt, the sampler, what it returned or the seed is of the wrong type.
        ValueError: `n` is below 1, or the sampler returned another number of groups than P, or
            another number of completions than n.

    Examples:
        >>> def shout(prompts, n, seed):
        ...     return [[Completion([1], prompt.upper())] * n for prompt in prompts]
        >>> sample_group(["a", "b"], shout, 2).texts
        [['A', 'A'], ['B', 'B']]
    """
    checked = check_prompts(prompts)
    check_sampler(sampler)
    check_count("n", n)
    seeds = prompt_seeds(seed, len(checked))
    prompt_ids = [encode(sampler, prompt) for prompt in checked]
    asked = [
        copy_prompt(prompt if ids is None else ids)
        for prompt, ids in zip(checked, prompt_ids, strict=True)
    ]
    drawn = run_blocking(sample_batch(sampler, asked, n, seeds)) if asked else []
    return Samples(checked, drawn, prompt_ids)


def encode(sampler: AnySampler, prompt: Prompt) -> list[int] | None:
    """Render a prompt with the sampler's `encode`; None if it has none."""
    render = getattr(sampler, "encode", None)
    return None if render is None else list(check_ids("the result of encode", render(prompt)))


async def sample_batch(
    sampler: AnySampler,
    prompts: list[Prompt],
    n: int,
    seeds: list[int] | None,
    on_done: Callable[[int], None] | None = None,
) -> CompletionGroups:
    """Draw n completions of each prompt in one call if the sampler has a form for that.

    If it has none, `on_done` gets the position of each prompt when its own call returns.
    """
    batch = _batch_form(sampler)
    if batch is None:
        one = cast(AsyncSampler, sampler).sample_one

        async def call(position: int) -> list[Completion]:
            seed = None if seeds is None else seeds[position]
            group = await one(prompts[position], n, seed=seed)
            if on_done is not None:
                on_done(position)
            return group

        groups: Any = list(await asyncio.gather(*map(call, range(len(prompts)))))
    else:
        groups = batch(prompts, n, seeds)
        if inspect.isawaitable(groups):
            groups = await groups
    return check_groups(groups, len(prompts), n)


async def sample_one(
    sampler: AnySampler,
    prompt: Prompt,
    n: int,
    seed: int | None,
    *,
    priority: int = 0,
    on_left: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Draw n completions of one prompt without blocking the loop.

    Samplers whose `takes_priority` is true get `priority`: lower goes first. If the sampler has
    `stream_one`, `on_left` gets the number of completions still unfinished whenever one is done. A
    sampler without an asynchronous form runs in a thread (`asyncio.to_thread`): several
    calls may be in it at once, and one that has begun cannot be cancelled, only ignored.
    """
    options = {"priority": priority} if getattr(sampler, "takes_priority", False) else {}
    stream = getattr(sampler, "stream_one", None)
    if on_left is not None and stream is not None:
        drawn = stream(prompt, n, seed=seed, **options)
        return await _collect(drawn, n, on_left)
    one = getattr(sampler, "sample_one", None)
    if one is not None:
        drawn = await one(prompt, n, seed=seed, **options)
        return check_groups([drawn], 1, n)[0]
    batch = _batch_form(sampler)
    assert batch is not None
    groups: Any = await asyncio.to_thread(batch, [prompt], n, None if seed is None else [seed])
    if inspect.isawaitable(groups):
        groups = await groups
    return check_groups(groups, 1, n)[0]


async def _collect(
    stream: AsyncGenerator[tuple[int, Completion], None], n: int, on_left: Callable[[int], None]
) -> list[Completion]:
    drawn: dict[int, Completion] = {}
    async with aclosing(stream):
        async for position, completion in stream:
            if position in drawn or position not in range(n):
                raise ValueError(
                    f"stream_one must yield each position below n = {n} once, got {position} "
                    f"after {sorted(drawn)}"
                )
            drawn[position] = completion
            on_left(n - len(drawn))
    return check_groups([[drawn[position] for position in sorted(drawn)]], 1, n)[0]


def _batch_form(sampler: AnySampler) -> SamplerFunction | None:
    """Return the sampler's form for many prompts; None if it has only the form for one."""
    sample = getattr(sampler, "sample", None)
    if sample is not None:
        return lambda prompts, n, seed: sample(prompts, n, seed=seed)
    if hasattr(sampler, "sample_one"):
        return None
    return cast(SamplerFunction, sampler)


def check_sampler(sampler: object) -> None:
    """Raise TypeError unless the sampler has one of the forms in the module's docstring."""
    if isinstance(sampler, type):
        raise TypeError(f"sampler must be an instance, got the class {sampler.__name__}")
    if not (hasattr(sampler, "sample") or hasattr(sampler, "sample_one") or callable(sampler)):
        raise TypeError(
            "sampler must have sample(prompts, n, *, seed), or sample_one(prompt, n, *, seed), or "
            f"be a function (prompts, n, seed), got {describe(sampler)}"
        )


def run_blocking(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end, in a thread of its own if this thread's loop is running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
