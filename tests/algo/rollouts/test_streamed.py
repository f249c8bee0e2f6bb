"""The stream: order, slots, priorities, and what a close, a cancel or a failure leaves."""

import asyncio
from contextlib import aclosing

import pytest
from canned_rollouts import ARROW, PROMPTS, by_text, canned, graded, streamed
from manual_engine import Consumer, Engine, in_loop, settle

from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.rollouts.journal import load_journal
from igrpo_algo.rollouts.two_stage import stream_two_stage_rollout


@in_loop
async def test_no_prompt_waits_for_another_ones_drafts():
    engine = Engine()
    got = Consumer(stream_two_stage_rollout(["a", "b"], engine, by_text, rules=ARROW))
    await settle()
    assert engine.began == ["a", "b"]
    await engine.answer("b", "1")
    await engine.answer("b -> 1", "2")
    assert got.finished == [1]
    await engine.answer("a", "1")
    await engine.answer("a -> 1", "2")
    await got.task
    assert got.finished == [1, 0]


@in_loop
async def test_drafts_go_first_when_a_slot_is_free():
    engine = Engine()
    got = Consumer(
        stream_two_stage_rollout(["a", "b", "c"], engine, by_text, rules=ARROW, concurrency=4)
    )
    await settle()
    assert engine.began == ["a"]
    for name in ("a", "b", "c", "a -> 1", "b -> 1", "c -> 1"):
        assert list(engine.open) == [name]
        await engine.answer(name, "1")
    await got.task
    assert got.finished == [0, 1, 2]


@in_loop
async def test_an_earlier_round_goes_before_a_later_one_that_waited_longer():
    engine = Engine()
    options = {"rules": ARROW, "rounds": 2, "concurrency": 8}
    got = Consumer(stream_two_stage_rollout(["a", "b", "c", "d"], engine, by_text, **options))
    await settle()
    for name in ("a", "b", "c"):
        await engine.answer(name, "1")
    await engine.answer("a -> 1", "2")
    await engine.answer("d", "1")
    assert list(engine.open) == ["b -> 1", "c -> 1"]  # a's round 2 waits, then d's round 1
    await engine.answer("b -> 1", "2")
    assert list(engine.open) == ["c -> 1", "d -> 1"]
    for name in ("c -> 1", "d -> 1", "a -> 2", "b -> 2", "c -> 2", "d -> 2"):
        await engine.answer(name, "2")
    await got.task
    assert got.finished == [0, 1, 2, 3]


@pytest.mark.parametrize("options", [{}, {"reward_max": 1.0}])
def test_a_sampler_that_takes_a_priority_is_told_the_stage(options):
    class Engine:
        takes_priority = True

        async def sample_one(self, prompt, n, *, seed=None, priority=None):
            told.add((prompt, priority))
            return [Completion([1], "1")] * n

    told = set()
    streamed(["a"], Engine(), by_text, rounds=2, rules=ARROW, **options)
    assert told == {("a", 0), ("a -> 1", 1), ("a -> 1", 2)}


@in_loop
async def test_closing_the_stream_cancels_what_runs_and_keeps_what_finished(tmp_path):
    engine, path = Engine(), tmp_path / "journal.jsonl"
    options = {"rules": ARROW, "journal": path, "concurrency": 16}
    stream = stream_two_stage_rollout(["a", "b", "c", "d"], engine, by_text, **options)
    first = asyncio.ensure_future(anext(stream))
    await settle()
    for name in ("b", "b -> 1", "c", "c -> 1"):
        await engine.answer(name, "1")
    assert (await first).index == 1
    await stream.aclose()
    assert sorted(engine.cancelled) == ["a", "d"]
    assert not engine.open
    assert [group.index for group in load_journal(path)] == [1, 2]

    engine = Engine()
    got = Consumer(stream_two_stage_rollout(["a", "b", "c", "d"], engine, by_text, **options))
    await settle()
    assert got.finished == [1, 2]
    assert sorted(engine.open) == ["a", "d"]
    for name in ("a", "d", "d -> 1", "a -> 1"):
        await engine.answer(name, "1")
    await got.task
    assert got.finished == [1, 2, 3, 0]
    assert [group.index for group in load_journal(path)] == [1, 2, 3, 0]


@in_loop
async def test_cancelling_the_consumer_cancels_the_engine():
    engine = Engine()
    got = Consumer(stream_two_stage_rollout(["a", "b"], engine, by_text))
    await settle()
    got.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await got.task
    assert sorted(engine.cancelled) == ["a", "b"]


@in_loop
async def test_one_failure_ends_the_stream_after_what_finished_before_it(tmp_path):
    engine, path = Engine(), tmp_path / "journal.jsonl"
    stream = stream_two_stage_rollout(["a", "b", "c"], engine, by_text, rules=ARROW, journal=path)
    first = asyncio.ensure_future(anext(stream))
    await settle()
    await engine.answer("a", "1")
    engine.open["a -> 1"].set_result("1")
    engine.open["b"].set_exception(OSError("connection lost"))
    await settle()
    assert (await first).index == 0
    with pytest.raises(OSError, match="connection lost") as error:
        await anext(stream)
    assert error.value.__notes__ == ["at stage 0 of prompts[1]"]
    assert engine.cancelled == ["c"]
    assert [group.index for group in load_journal(path)] == [0]


def test_a_sampler_in_threads_can_be_left():
    async def main():
        stream = stream_two_stage_rollout(PROMPTS, canned, graded, seed=1)
        async with aclosing(stream):
            return (await anext(stream)).index

    assert asyncio.run(main()) in range(5)
