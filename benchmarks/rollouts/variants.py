"""The rollouts that are compared, made by the library's own functions over any sampler."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from igrpo_algo import (
    DraftRules,
    Rollouts,
    TokenSplice,
    stream_two_stage_rollout,
    two_stage_rollout,
)
from igrpo_algo.rollouts import two_stage as rollout
from igrpo_algo.rollouts.setup import Setup
from igrpo_algo.rollouts.slots import Slots

from .clock import run_virtual

GROUP = 8
"""Completions per prompt, GRPO's group size; iGRPO draws half as drafts, half as refinements."""

SPLIT = {
    "num_drafts": GROUP // 2,
    "num_refinements": GROUP // 2,
    "rules": DraftRules(splice=TokenSplice()),
}
Reward = Callable[..., Any]
Prompts = Sequence[list[int]]


def grpo(sampler: Any, prompts: Prompts, reward: Reward, concurrency: int) -> Rollouts:
    return two_stage_rollout(prompts, sampler, reward, num_drafts=0, num_refinements=GROUP)


def barrier(sampler: Any, prompts: Prompts, reward: Reward, concurrency: int) -> Rollouts:
    return two_stage_rollout(prompts, sampler, reward, **SPLIT)


def stream(
    sampler: Any, prompts: Prompts, reward: Reward, concurrency: int, **options: Any
) -> Rollouts:
    async def collect() -> Rollouts:
        rollouts = stream_two_stage_rollout(
            prompts, sampler, reward, concurrency=concurrency, **SPLIT, **options
        )
        return Rollouts.of([rollout async for rollout in rollouts])

    return rollout.run_blocking(collect())


class _RefinementsFirst(Slots):
    def take(self, wanted: int, *, rank: tuple[int, ...]) -> Any:
        return super().take(wanted, rank=tuple(-part for part in rank))


def stream_refinements_first(*arguments: Any) -> Rollouts:
    """The opposite of what the library does."""
    with patch.object(rollout, "Slots", _RefinementsFirst):
        return stream(*arguments)


def early_selection(*arguments: Any) -> Rollouts:
    return stream(*arguments, reward_max=1.0)


VARIANTS = {
    "grpo": grpo,
    "barrier": barrier,
    "stream, refinements first": stream_refinements_first,
    "stream": stream,
    "early selection": early_selection,
}


@contextmanager
def simulated_time() -> Iterator[None]:
    """Let the library run in a loop whose time is simulated."""
    with (
        patch.object(rollout, "run_blocking", run_virtual),
        patch.object(Setup, "clock", lambda setup: asyncio.get_running_loop().time()),
    ):
        yield


def reward(prompts: Prompts, completions: list[str]) -> list[float]:
    """The text is the reward: 1 or 0."""
    return [float(text) for text in completions]
