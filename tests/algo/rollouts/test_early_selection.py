"""Drafts raced to the reward's maximum: who wins, who is cancelled, what ends the race."""

import asyncio

import pytest
from canned_rollouts import ARROW, PROMPTS, by_text, canned, gather, listed, streamed
from manual_engine import Consumer, Engine, in_loop, settle

from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.rollouts.progress import StageFinished, StageStarted
from igrpo_algo.rollouts.records import Rollouts
from igrpo_algo.rollouts.two_stage import stream_two_stage_rollout


@in_loop
async def test_early_selection_starts_stage_two_and_cancels_the_other_drafts():
    engine, events = Engine(), []
    stream = stream_two_stage_rollout(
        ["a"],
        engine,
        by_text,
        num_drafts=4,
        num_refinements=2,
        rules=ARROW,
        reward_max=1.0,
        concurrency=3,
        on_progress=events.append,
    )
    first = asyncio.ensure_future(anext(stream))
    await settle()
    assert list(engine.open) == ["a", "a#1", "a#2"]
    await engine.answer("a#1", "0")
    assert list(engine.open) == ["a", "a#2", "a#3"]
    await engine.answer("a#2", "1")
    assert engine.cancelled == ["a", "a#3"]
    assert list(engine.open) == ["a -> 1"]
    await engine.answer("a -> 1", "1")
    rollouts = Rollouts([await first])
    assert rollouts.cancelled.tolist() == [2]
    assert rollouts.chosen.tolist() == [2]
    assert rollouts.draft_lengths.tolist() == [[0, 1, 1, 0]]
    finish = [draft.finish_reason for draft in rollouts.drafts.flat]
    assert finish == ["cancelled", "stop", "stop", "cancelled"]
    assert [type(event) for event in events] == [StageStarted, StageFinished] * 2
    assert [reward for reward in rollouts.draft_rewards[0].tolist() if reward == reward] == [0, 1]
    await stream.aclose()


def test_early_selection_without_success_takes_the_best_of_all():
    half = lambda prompts, completions: [0.5] * len(completions)  # noqa: E731
    rollouts = streamed(PROMPTS, canned, half, reward_max=1.0, seed=1)
    assert not rollouts.cancelled.any()
    assert rollouts.chosen.tolist() == [0] * 5
    assert streamed(PROMPTS, canned, half, reward_max=1.0, seed=1) == rollouts


def test_a_reward_above_its_maximum_is_an_error():
    with pytest.raises(
        ValueError, match=r"reward_max = 0.5 is not the maximum: prompts\[0\] got 1"
    ):
        streamed(["q"], listed(*"11111111"), by_text, reward_max=0.5)


@in_loop
async def test_an_error_in_one_draft_ends_the_race():
    engine = Engine()
    got = Consumer(stream_two_stage_rollout(["a"], engine, by_text, reward_max=1.0))
    await settle()
    engine.open["a#2"].set_exception(OSError("connection lost"))
    await settle()
    with pytest.raises(OSError, match="connection lost") as error:
        await got.task
    assert error.value.__notes__ == ["at stage 0 of prompts[0]"]
    assert not engine.open


@in_loop
async def test_early_selection_leaves_the_others_their_logprobs():
    class OneFast:
        calls = 0

        async def sample_one(self, prompt, n, *, seed=None):
            self.calls += 1
            if self.calls in (2, 3):
                await asyncio.sleep(60)
            return [Completion([1], "1", [-0.5])] * n

    stream = stream_two_stage_rollout(["q"], OneFast(), by_text, num_drafts=3, reward_max=1.0)
    rollouts = await gather(stream)
    assert rollouts.cancelled.tolist() == [2]
    assert rollouts.drafts.padded().logprobs.tolist() == [[-0.5], [0.0], [0.0]]
