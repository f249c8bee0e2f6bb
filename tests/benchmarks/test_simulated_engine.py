"""The simulated engine by hand: when each completion ends, what is cancelled, what is cached."""

import asyncio
import math

import pytest

from benchmarks.rollouts.clock import run_virtual
from benchmarks.rollouts.engine import Costs, PrefixCache, SimulatedEngine, Workload
from benchmarks.rollouts.fit import as_line
from benchmarks.rollouts.simulation import Setting, simulate
from benchmarks.rollouts.workloads import make_workload

FLAT = Costs((1, 2), (1.0, 1.0), 0.0)
RISING = Costs((1, 3), (1.0, 2.0), 0.0)


def ends(lengths, costs, slots, *, question=1, cancel_at=None, block=1):
    """Draw all completions of prompt 0 at time 0; give the time when each was done."""
    work = Workload(question, [lengths], [[True] * len(lengths)], len(lengths))

    async def main():
        engine = SimulatedEngine(costs, slots, work, block=block)
        loop = asyncio.get_running_loop()

        async def one():
            (completion,) = await engine.sample_one(work.prompts[0], 1)
            return loop.time(), len(completion.token_ids)

        tasks = [asyncio.create_task(one()) for _ in lengths]
        if cancel_at is not None:
            await asyncio.sleep(cancel_at)
            tasks[0].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        return [end if isinstance(end, BaseException) else end[0] for end in done], engine

    times, engine = run_virtual(main())
    return times, engine


def test_a_step_takes_what_lies_between_the_known_batch_sizes():
    assert [RISING.step(batch) for batch in (1, 2, 3, 5)] == [1.0, 1.5, 2.0, 3.0]
    line = as_line(Costs((1, 2, 4), (1.5, 2.0, 3.0), 0.25))
    assert [line.step(batch) for batch in (1, 8)] == pytest.approx([1.5, 5.0], abs=1e-12)
    assert line.prefill == 0.25


def test_one_slot_serves_one_after_the_other():
    times, engine = ends([3, 2, 1], FLAT, slots=1)
    assert times == pytest.approx([3, 5, 6], abs=1e-9)
    assert engine.tokens == 6


def test_steps_are_shorter_when_fewer_run():
    times, _ = ends([2, 4], RISING, slots=2)
    assert times == pytest.approx([2 * 1.5, 2 * 1.5 + 2 * 1.0], abs=1e-9)


def test_prompt_tokens_delay_everybody_and_the_cache_spares_the_second():
    costs = Costs((1, 2), (1.0, 1.0), 0.5)
    times, engine = ends([2, 2], costs, slots=2, question=4)
    delay = 4 * 0.5 + 1 * 0.5  # all of the first prompt, the last token of the second
    assert times == pytest.approx([delay + 2] * 2, abs=1e-9)
    assert (engine.prompt_tokens, engine.cached_tokens) == (8, 3)


def test_only_whole_blocks_are_cached():
    _, engine = ends([1, 1], FLAT, slots=2, question=7, block=3)
    assert engine.cached_tokens == 6


def test_a_cancelled_completion_gives_its_slot_and_counts_what_it_drew():
    times, engine = ends([10, 2], FLAT, slots=1, cancel_at=3.5)
    assert isinstance(times[0], asyncio.CancelledError)
    assert times[1] == pytest.approx(4 + 2, abs=1e-9), "joins with the next whole step"
    assert engine.tokens == 3 + 2


def test_the_cache_drops_what_was_used_longest_ago():
    cache = PrefixCache(10)
    for piece in "abc":
        cache.put(piece, 4)
        cache.put("a", 4)
    assert [cache.holds(piece) for piece in "abc"] == [True, False, True]
    assert cache.used == 8


def test_a_simulation_that_waits_for_nothing_says_so():
    with pytest.raises(RuntimeError, match="nothing left to wait for"):
        run_virtual(asyncio.Event().wait())


def test_time_is_simulated():
    async def main():
        await asyncio.sleep(1e6)
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == pytest.approx(1e6, abs=1e-6)


@pytest.fixture(scope="module")
def runs():
    work = make_workload(16, seed=0, success=0.5, question=8, mean=40, most=320)
    names = ("grpo", "barrier", "stream", "stream, refinements first", "early selection")
    return {name: simulate(name, work, RISING, 16, 8) for name in names}, work


def test_all_but_early_selection_draw_the_same_tokens(runs):
    drawn, work = runs
    total = sum(map(sum, work.lengths))
    tokens = {name: run.tokens for name, run in drawn.items()}
    assert tokens.pop("early selection") < total
    assert set(tokens.values()) == {total}


def test_lengths_belong_to_the_prompt_and_its_stage_in_every_variant(runs):
    drawn, work = runs
    for name in ("barrier", "stream", "stream, refinements first"):
        rollouts = drawn[name].rollouts
        assert rollouts.draft_lengths.tolist() == [row[:4] for row in work.lengths]
        assert rollouts.refinement_lengths.tolist() == [row[4:] for row in work.lengths]
    assert drawn["grpo"].rollouts.refinement_lengths.tolist() == work.lengths


def test_in_the_barrier_no_refinement_begins_before_the_last_draft_ends(runs):
    drawn, _ = runs
    last_draft = drawn["barrier"].rollouts.times[:, 0, 1].max()
    assert (drawn["barrier"].rollouts.times[:, 1, 0] >= last_draft).all()
    assert (drawn["stream"].rollouts.times[:, 1, 0] < last_draft).any()
    assert drawn["stream"].seconds < drawn["barrier"].seconds


def test_seconds_are_those_of_the_engine_by_a_bound_from_below(runs):
    """No variant may be faster than its tokens in full batches, or than its longest chain."""
    drawn, work = runs
    for name, run in drawn.items():
        if name != "early selection":
            assert run.seconds >= sum(map(sum, work.lengths)) / 16 * RISING.step(16) - 1e-6
    chain = max(max(row[:4]) + max(row[4:]) for row in work.lengths)
    assert drawn["stream"].seconds >= chain * RISING.step(1)


def test_whole_groups_hold_their_slots_longer():
    setting = Setting(FLAT, slots=16, mean=40, queue=0)
    held = Setting(FLAT, slots=16, mean=40, queue=0, one_by_one=False)
    assert setting.simulate("stream", 0).seconds < 0.9 * held.simulate("stream", 0).seconds


def test_lengths_have_the_mean_that_was_asked_for():
    work = make_workload(4000, seed=1, success=0.25, question=1, mean=100, most=10**6, shared=0.5)
    flat = [length for row in work.lengths for length in row]
    assert sum(flat) / len(flat) == pytest.approx(100, rel=0.05)
    right = [each for row in work.success for each in row]
    assert sum(right) / len(right) == pytest.approx(0.25, abs=0.01)
    logs = [[math.log(length) for length in row] for row in work.lengths]
    means = [sum(row) / 8 for row in logs]
    overall = sum(means) / len(means)
    between = sum((mean - overall) ** 2 for mean in means) / len(means)
    assert between == pytest.approx(0.64 * (0.5 + 0.5 / 8), rel=0.1)
