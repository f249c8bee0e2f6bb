"""Samplers that hand out each completion as it is done: slots come back one by one."""

import asyncio

import pytest
from manual_engine import settle

from igrpo_algo import Completion, Rollouts, stream_two_stage_rollout, two_stage_rollout
from igrpo_algo.rollouts.sampling import sample_one
from igrpo_algo.rollouts.slots import Slots


class Engine:
    """Keeps each completion open until the test ends it; its text is the seed and its position."""

    def __init__(self):
        self.open = {}
        self.closed = []

    async def sample_one(self, prompt, n, *, seed=None):
        return [Completion([1], f"{seed}.{position}") for position in range(n)]

    async def stream_one(self, prompt, n, *, seed=None):
        ready = asyncio.Queue()
        self.open[prompt] = ready
        try:
            for _ in range(n):
                position = await ready.get()
                yield position, Completion([1], f"{seed}.{position}")
        finally:
            self.closed.append(prompt)
            del self.open[prompt]

    async def end(self, prompt, *positions):
        for position in positions:
            self.open[prompt].put_nowait(position)
        await settle()


def zeros(prompts, completions):
    return [0.0] * len(completions)


def collect(stream):
    async def main():
        return Rollouts.of([group async for group in stream])

    return main()


def test_a_finished_completion_lends_its_slot_to_the_next_prompt():
    async def main():
        engine = Engine()
        stream = stream_two_stage_rollout(
            ["a", "b"], engine, zeros, num_drafts=0, num_refinements=2, concurrency=3
        )
        task = asyncio.create_task(collect(stream))
        await settle()
        assert list(engine.open) == ["a"]
        await engine.end("a", 1)
        assert list(engine.open) == ["a", "b"], "b waits although two slots are free"
        await engine.end("b", 0, 1)
        await engine.end("a", 0)
        assert [group.index for group in await task] == [0, 1]
        assert engine.closed == ["b", "a"]

    asyncio.run(main())


def test_a_request_wider_than_all_slots_gives_back_only_what_it_does_not_use():
    async def main():
        engine = Engine()
        stream = stream_two_stage_rollout(
            ["a", "b"], engine, zeros, num_drafts=0, num_refinements=4, concurrency=2
        )
        task = asyncio.create_task(collect(stream))
        await settle()
        await engine.end("a", 0, 1, 2)
        assert list(engine.open) == ["a"], "b needs two slots, and a still uses one"
        await engine.end("a", 3)
        assert list(engine.open) == ["b"]
        await engine.end("b", 0, 1, 2, 3)
        await task

    asyncio.run(main())


def test_completions_stand_at_their_positions_whatever_came_first():
    async def main():
        engine = Engine()
        stream = stream_two_stage_rollout(["a"], engine, zeros, num_drafts=0, seed=1)
        task = asyncio.create_task(collect(stream))
        await settle()
        await engine.end("a", 2, 0, 3, 1)
        return await task

    in_step = two_stage_rollout(["a"], Engine(), zeros, num_drafts=0, seed=1)
    assert asyncio.run(main()) == in_step


def test_a_stream_that_is_closed_closes_the_generator():
    async def main():
        engine = Engine()
        stream = stream_two_stage_rollout(["a"], engine, zeros)
        task = asyncio.create_task(collect(stream))
        await settle()
        await engine.end("a", 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await stream.aclose()
        assert engine.closed == ["a"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("positions", "match"),
    [
        ([0, 0], r"each position below n = 2 once, got 0 after \[0\]"),
        ([0, 2], r"each position below n = 2 once, got 2 after \[0\]"),
        ([-1], r"each position below n = 2 once, got -1 after \[\]"),
        ([1], "must return n = 2 completions per prompt, got 1"),
    ],
)
def test_a_generator_that_yields_something_else_is_named(positions, match):
    class Wrong:
        async def stream_one(self, prompt, n, *, seed=None):
            for position in positions:
                yield position, Completion([1], "")

    with pytest.raises(ValueError, match=match):
        asyncio.run(sample_one(Wrong(), "a", 2, None, on_left=[].append))


def test_a_lease_never_gives_back_twice():
    async def main():
        slots = Slots(4)
        async with slots.take(3, rank=(0,)) as lease:
            for most, free in ((5, 1), (2, 2), (2, 2), (0, 4), (3, 4)):
                lease.keep(most)
                assert slots.free == free
        assert slots.free == 4

    asyncio.run(main())


def test_first_drafts_of_all_prompts_go_before_second_ones():
    """In early selection a second draft is drawn only if the first drafts left it a reason."""

    class Fails:
        began: tuple[str, ...] = ()

        async def sample_one(self, prompt, n, *, seed=None):
            self.began += (prompt,)
            await asyncio.sleep(0)
            return [Completion([1], "x")] * n

    engine = Fails()
    stream = stream_two_stage_rollout(
        ["a", "b", "c"], engine, zeros, num_drafts=2, num_refinements=1, reward_max=1.0,
        concurrency=1,
    )  # fmt: skip
    asyncio.run(collect(stream))
    assert "".join(prompt[0] for prompt in engine.began) == "abcabcabc"
    assert [len(prompt) > 1 for prompt in engine.began] == [False] * 6 + [True] * 3


def test_in_step_each_prompt_has_its_own_end_where_the_sampler_takes_one_at_a_time():
    class Slow:
        async def sample_one(self, prompt, n, *, seed=None):
            for _ in range(50 * (prompt == "a")):
                await asyncio.sleep(0)
            return [Completion([1], "x")] * n

    rollouts = two_stage_rollout(["a", "b"], Slow(), zeros, num_drafts=1, num_refinements=1)
    (_, slow_end), (_, fast_end) = (rollouts.times[row, 0].tolist() for row in (0, 1))
    assert fast_end < slow_end <= float(rollouts.times[:, 1, 0].min())
