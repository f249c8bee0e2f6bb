"""What drives the courses of all prompts: in step, each on its own, drafts raced to a maximum."""

import asyncio
import math
import os
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from .completions import Completion
from .journal import Journal
from .one_prompt import Course, Plan
from .records import Group
from .sampling import Prompt, derive_seed, sample_batch, sample_one
from .slots import Slots

CANCELLED = Completion([], "", [], "cancelled")


async def run_in_step(plan: Plan) -> list[Group]:
    """Take all prompts through each stage together, one call of the sampler per stage."""
    courses = [Course(plan, index) for index in range(len(plan.prompts))]
    for number in range(plan.rounds + 1):
        asked = [(course, prompt) for course in courses if (prompt := course.ask()) is not None]
        if asked:
            await _step(plan, number, asked)
    return [course.group for course in courses]


async def _step(plan: Plan, number: int, asked: list[tuple[Course, Prompt]]) -> None:
    seeds = [plan.seed_of(course.index, number) for course, _ in asked]
    known = [seed for seed in seeds if seed is not None]
    started = [plan.start(course.index, number) for course, _ in asked]
    ended: dict[int, float] = {}

    def note_end(position: int) -> None:
        ended[position] = plan.clock()

    prompts = [prompt for _, prompt in asked]
    groups = await sample_batch(plan.sampler, prompts, plan.size(number), known or None, note_end)
    now = plan.clock()
    told = [
        course.tell(group, start, ended.get(position, now))
        for position, ((course, _), group, start) in enumerate(
            zip(asked, groups, started, strict=True)
        )
    ]
    await asyncio.gather(*told)


async def run_stream(
    plan: Plan,
    slots: Slots,
    reward_max: float | None,
    path: str | os.PathLike[str] | None,
    finished: list[Group],
) -> AsyncGenerator[Group, None]:
    """Yield the finished groups, then those of the other prompts as each comes to its end."""
    for group in finished:
        yield group
    done: asyncio.Queue[asyncio.Task[Group]] = asyncio.Queue()
    with nullcontext() if path is None else Journal(path, plan.header) as journal:

        async def run(index: int) -> Group:
            group = await _run_alone(Course(plan, index), slots, reward_max)
            if journal is not None:
                journal.append(group)
            return group

        left = sorted(set(range(len(plan.prompts))) - {group.index for group in finished})
        tasks = [asyncio.create_task(run(index)) for index in left]
        for task in tasks:
            task.add_done_callback(done.put_nowait)
        try:
            for _ in tasks:
                yield (await done.get()).result()
        finally:
            await _cancel(tasks)


async def _run_alone(course: Course, slots: Slots, reward_max: float | None) -> Group:
    plan = course.plan
    for number in range(plan.rounds + 1):
        prompt = course.ask()
        if prompt is None:
            continue
        if number == 0 and reward_max is not None:
            await _race(course, prompt, slots, reward_max)
            continue
        n, seed = plan.size(number), plan.seed_of(course.index, number)
        async with slots.take(n, rank=(number,)) as lease:
            started = plan.start(course.index, number)
            with located(f"stage {number} of prompts[{course.index}]"):
                completions = await sample_one(
                    plan.sampler, prompt, n, seed, priority=number, on_left=lease.keep
                )
            ended = plan.clock()
        await course.tell(completions, started, ended)
    return course.group


async def _race(course: Course, prompt: Prompt, slots: Slots, reward_max: float) -> None:
    """Draw drafts one by one; the first to reach the maximum ends the others."""
    plan, index = course.plan, course.index
    seed = plan.seed_of(index, 0)
    starts: list[float] = []

    async def draw(position: int) -> tuple[Completion, float]:
        own = None if seed is None else derive_seed(seed, position)
        async with slots.take(1, rank=(0, position)):
            starts.append(plan.clock() if starts else plan.start(index, 0))
            with located(f"stage 0 of prompts[{index}]"):
                (completion,) = await sample_one(plan.sampler, prompt, 1, own)
        (reward,) = await plan.score(index, [completion])
        if reward > reward_max:
            raise ValueError(
                f"reward_max = {reward_max} is not the maximum: prompts[{index}] got {reward}"
            )
        return completion, reward

    tasks = [asyncio.create_task(draw(position)) for position in range(plan.num_drafts)]
    try:
        unfinished, won = set(tasks), False
        while unfinished and not won:
            ready, unfinished = await asyncio.wait(unfinished, return_when=asyncio.FIRST_COMPLETED)
            won = any(task.result()[1] == reward_max for task in ready)
    finally:
        await _cancel(tasks)
    ended = plan.clock()
    drawn = [(CANCELLED, math.nan) if task in unfinished else task.result() for task in tasks]
    completions, rewards = [draft for draft, _ in drawn], [reward for _, reward in drawn]
    await course.tell(completions, min(starts), ended, rewards)


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel what is unfinished and wait until it is gone."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def located(where: str) -> Iterator[None]:
    """Add to an error where it happened."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at {where}")
        raise
