"""Each prompt goes through its stages on its own: none waits for another's stage."""

import asyncio
import math
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import nullcontext
from typing import Any

from ..prompts import Prompt
from ..seeds import derive_seed
from .completions import Completion
from .journal import Journal
from .one_prompt import OnePrompt
from .records import Rollout
from .sampling import sample_one
from .setup import Setup, located
from .slots import Slots

CANCELLED = Completion([], "", [], "cancelled")


async def run_stream(
    setup: Setup, slots: Slots, reward_max: float | None, path: str | os.PathLike[str] | None
) -> AsyncGenerator[Rollout, None]:
    """Yield what the journal holds, then each other prompt as it comes to its end."""
    done: asyncio.Queue[asyncio.Task[Rollout]] = asyncio.Queue()
    with nullcontext() if path is None else Journal(path, setup.header) as journal:

        async def run(index: int) -> Rollout:
            rollout = await _run_alone(OnePrompt(setup, index), slots, reward_max)
            if journal is not None:
                journal.append(rollout)
            return rollout

        finished = [] if journal is None else journal.finished
        for rollout in finished:
            yield rollout
        left = sorted(set(range(len(setup.prompts))) - {rollout.index for rollout in finished})
        tasks = [asyncio.create_task(run(index)) for index in left]
        for task in tasks:
            task.add_done_callback(done.put_nowait)
        try:
            for _ in tasks:
                yield (await done.get()).result()
        finally:
            await _cancel(tasks)


async def _run_alone(one: OnePrompt, slots: Slots, reward_max: float | None) -> Rollout:
    setup = one.setup
    for number in range(setup.rounds + 1):
        prompt = one.next_prompt()
        if prompt is None:
            continue
        if number == 0 and reward_max is not None:
            await _race(one, prompt, slots, reward_max)
            continue
        n, seed = setup.size(number), setup.sampling_seed(one.index, number)
        async with slots.take(n, rank=(number,)) as lease:
            started = setup.report_start(one.index, number)
            with located(f"stage {number} of prompts[{one.index}]"):
                completions = await sample_one(
                    setup.sampler, prompt, n, seed, priority=number, on_left=lease.keep
                )
            ended = setup.clock()
        scored = await setup.score({one.index: completions})
        one.finish_stage(completions, *scored[one.index], started, ended)
    return one.rollout


async def _race(one: OnePrompt, prompt: Prompt, slots: Slots, reward_max: float) -> None:
    """Draw drafts one by one; the first to reach the maximum ends the others."""
    setup, index = one.setup, one.index
    seed = setup.sampling_seed(index, 0)
    starts: list[float] = []

    async def draw(position: int) -> tuple[Completion, float]:
        own = None if seed is None else derive_seed(seed, position)
        async with slots.take(1, rank=(0, position)):
            starts.append(setup.clock() if starts else setup.report_start(index, 0))
            with located(f"stage 0 of prompts[{index}]"):
                (completion,) = await sample_one(setup.sampler, prompt, 1, own)
        ((reward,), _) = (await setup.score({index: [completion]}))[index]
        if reward > reward_max:
            raise ValueError(
                f"reward_max = {reward_max} is not the maximum: prompts[{index}] got {reward}"
            )
        return completion, reward

    tasks = [asyncio.create_task(draw(position)) for position in range(setup.num_drafts)]
    try:
        unfinished, won = set(tasks), False
        while unfinished and not won:
            ready, unfinished = await asyncio.wait(unfinished, return_when=asyncio.FIRST_COMPLETED)
            won = any(task.result()[1] == reward_max for task in ready)
    finally:
        await _cancel(tasks)
    ended = setup.clock()
    drawn = [(CANCELLED, math.nan) if task in unfinished else task.result() for task in tasks]
    completions, rewards = [draft for draft, _ in drawn], [reward for _, reward in drawn]
    one.finish_stage(completions, rewards, rewards, min(starts), ended)


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel what is unfinished and wait until it is gone."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
