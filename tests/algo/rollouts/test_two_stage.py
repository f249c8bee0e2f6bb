"""Two-stage rollouts in step and streamed: what is drawn from what, in which order.

`canned` draws text that depends on prompt and seed alone, so both forms must give the same groups.
`Engine` answers a request when the test says so.
"""

import asyncio
import functools
import gc
import hashlib
import math
from contextlib import aclosing
from dataclasses import replace

import pytest

from igrpo_algo.drafts.rules import DraftRules, Fallback, Ties
from igrpo_algo.drafts.select import select_random_draft, select_worst_draft
from igrpo_algo.drafts.splice import TextSplice, TokenSplice
from igrpo_algo.drafts.text import DraftTemplate
from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.rollouts.journal import load_journal
from igrpo_algo.rollouts.one_prompt import StageFinished, StageStarted
from igrpo_algo.rollouts.records import Rollouts
from igrpo_algo.rollouts.scoring import RewardError
from igrpo_algo.rollouts.two_stage import stream_two_stage_rollout, two_stage_rollout

SPLICE = TextSplice(DraftTemplate(" -> ", ""))
ARROW = DraftRules(splice=SPLICE)
RANDOM = DraftRules(select_random_draft, ties=Ties.RANDOM)
PROMPTS = [f"q{i}" for i in range(5)]


def digest(*parts):
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


def canned(prompts, n, seed):
    def one(prompt, seed, i):
        ids = [digest(prompt, seed, i, t) % 50 for t in range(digest(prompt, seed, i) % 4)]
        return Completion(ids, f"{digest(prompt, seed, i)}", [-0.5 * t for t in ids])

    seeds = seed or [None] * len(prompts)
    return [[one(p, s, i) for i in range(n)] for p, s in zip(prompts, seeds, strict=True)]


def graded(prompts, completions):
    """0, 1, 2, or not scored."""
    values = [digest(p, c) % 4 for p, c in zip(prompts, completions, strict=True)]
    return [None if value == 3 else float(value) for value in values]


def listed(*texts):
    """Draw these texts, one call after the other."""
    calls = iter(texts)

    def sampler(prompts, n, seed):
        return [[Completion([1], next(calls)) for _ in range(n)] for _ in prompts]

    return sampler


def by_text(prompts, completions):
    """The text is the reward."""
    return [None if text == "none" else float(text) for text in completions]


async def gather(stream):
    return Rollouts.of([group async for group in stream])


def streamed(*arguments, **options):
    return asyncio.run(gather(stream_two_stage_rollout(*arguments, **options)))


def both(*arguments, **options):
    """Roll out in step and streamed; give what both must give."""
    in_step = two_stage_rollout(*arguments, **options)
    assert streamed(*arguments, **options) == in_step
    assert streamed(*arguments, **options, concurrency=3) == in_step
    return in_step


# What is drawn from what.


def test_refinements_are_drawn_from_the_best_draft_and_scored_on_the_question():
    seen = []

    def reward(prompts, completions, answer):
        seen.append((prompts, completions, answer))
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    rollouts = two_stage_rollout(
        ["1+1"],
        listed("3", "2", "4", "2"),
        reward,
        num_drafts=2,
        num_refinements=2,
        columns={"answer": ["2"]},
        rules=ARROW,
    )
    assert rollouts.drafts.texts == [["3", "2"]]
    assert rollouts.chosen.tolist() == [1]
    assert rollouts.refinements.prompts == ["1+1 -> 2"]
    assert rollouts.refinements.texts == [["4", "2"]]
    assert rollouts.refinement_rewards.tolist() == [[0.0, 1.0]]
    assert seen == [(["1+1"] * 2, texts, ["2"] * 2) for texts in (["3", "2"], ["4", "2"])]


@pytest.mark.parametrize(("n", "g"), [(4, 4), (1, 3), (3, 1), (0, 2)])
def test_stream_and_step_agree_at_any_sizes(n, g):
    rollouts = both(PROMPTS, canned, graded, num_drafts=n, num_refinements=g, seed=3)
    assert rollouts.draft_rewards.shape == (5, n)
    assert rollouts.refinement_rewards.shape == (5, g)
    assert [group.index for group in rollouts] == [0, 1, 2, 3, 4]


def test_a_seed_fixes_the_samples_and_another_changes_them():
    first = two_stage_rollout(PROMPTS, canned, graded, seed=1)
    assert two_stage_rollout(PROMPTS, canned, graded, seed=1) == first
    assert two_stage_rollout(PROMPTS, canned, graded, seed=2) != first
    assert two_stage_rollout(PROMPTS[:2], canned, graded, seed=1) == first[:2]


def test_each_prompt_and_stage_has_its_own_seed():
    seeds = []

    def sampler(prompts, n, seed):
        seeds.extend(seed)
        return canned(prompts, n, seed)

    two_stage_rollout(PROMPTS, sampler, graded, seed=1, rounds=2)
    assert len(set(seeds)) == len(seeds) == 15


def test_without_a_seed_the_sampler_gets_none():
    def sampler(prompts, n, seed):
        assert seed is None
        return canned(prompts, n, seed)

    both(PROMPTS, sampler, graded)


def test_an_asynchronous_sampler_and_reward_serve_both_forms():
    class Sampler:
        async def sample_one(self, prompt, n, *, seed=None):
            await asyncio.sleep(digest(prompt, seed) % 3 / 1000)
            return canned([prompt], n, [seed])[0]

    async def reward(prompts, completions):
        await asyncio.sleep(digest(completions) % 3 / 1000)
        return graded(prompts, completions)

    expected = two_stage_rollout(PROMPTS, canned, graded, seed=5)
    assert both(PROMPTS, Sampler(), reward, seed=5) == expected


def test_no_prompts():
    assert both([], canned, graded) == Rollouts([])


@pytest.mark.parametrize("rules", [DraftRules(), replace(RANDOM, dropout=0.5, splice=SPLICE)])
def test_no_drafts_is_grpo_whatever_the_rules(rules):
    rollouts = both(PROMPTS, canned, graded, num_drafts=0, seed=0, rules=rules)
    assert rollouts.refinements.prompts == PROMPTS
    assert not rollouts.found.any()
    assert not rollouts.conditioned.any()


def test_chat_and_token_prompts():
    chat = [{"role": "user", "content": "1+1"}]
    rollouts = two_stage_rollout(
        [chat],
        listed("2", "3"),
        lambda prompts, completions: [float(completions[0][0]["content"])],
        num_drafts=1,
        num_refinements=1,
        rules=ARROW,
    )
    assert rollouts.refinements.prompts == [[{"role": "user", "content": "1+1 -> 2"}]]
    tokens = two_stage_rollout(
        [[5, 6]],
        listed("2", "3"),
        by_text,
        num_drafts=1,
        num_refinements=1,
        rules=DraftRules(splice=TokenSplice()),
    )
    assert tokens.refinements.prompts == [[5, 6, 1]]


# Which draft, and whether any.


def drafts(texts, *, rounds=1, **rules):
    """Roll out one prompt with these drafts, under these rules, and one refinement of reward 0."""
    return two_stage_rollout(
        ["q"],
        listed(*texts, *["0"] * rounds),
        by_text,
        num_drafts=len(texts),
        num_refinements=1,
        rounds=rounds,
        rules=replace(ARROW, **rules),
    )


def test_ties_go_to_the_first_or_to_the_shortest():
    def sampler(prompts, n, seed):
        return [[Completion([1] * (3 - i), "1") for i in range(n)] for _ in prompts]

    for ties, index in ((Ties.FIRST, 0), (Ties.SHORTEST, 2)):
        rules = DraftRules(ties=ties)
        rollouts = two_stage_rollout(["q"], sampler, by_text, num_drafts=3, rules=rules)
        assert rollouts.chosen.tolist() == [index]


def test_controls():
    assert drafts(["1", "0", "2"], select=select_worst_draft).chosen.tolist() == [1]
    random = both(PROMPTS * 8, canned, graded, rules=RANDOM, seed=4)
    assert len(set(random.chosen.tolist())) > 2
    assert random != two_stage_rollout(PROMPTS * 8, canned, graded, rules=RANDOM, seed=5)


def test_a_selection_score_ranks_and_the_reward_trains():
    def shortest(prompts, completions):
        return [-len(c) for c in completions]

    rollouts = drafts(["10", "5", "none"], selection_score=shortest)
    assert rollouts.chosen.tolist() == [1]
    assert rollouts.draft_rewards[0, :2].tolist() == [10.0, 5.0]
    assert rollouts.groups[0].choices[0].reward == 5.0
    both(PROMPTS, canned, graded, rules=DraftRules(selection_score=shortest), seed=1)


def test_a_draft_without_a_reward_is_not_selected_by_another_score():
    high = lambda prompts, completions: [9.0 if c == "none" else 0.0 for c in completions]  # noqa: E731
    assert drafts(["0", "none"], selection_score=high).chosen.tolist() == [0]


@pytest.mark.parametrize(
    ("rule", "prompts", "skipped"),
    [
        (Fallback.CHOSEN_DRAFT, ["q -> 0.5"], False),
        (Fallback.PLAIN_PROMPT, ["q"], False),
        (Fallback.SKIP, ["q"], True),
    ],
)
def test_all_drafts_failed(rule, prompts, skipped):
    rollouts = drafts(["0", "0.5"], failed_below=1.0, when_failed=rule)
    assert rollouts.failed.tolist() == [True]
    assert rollouts.chosen.tolist() == [1]
    assert rollouts.refinements.prompts == prompts
    assert rollouts.skipped.tolist() == [skipped]
    assert rollouts.refinement_rewards.isnan().tolist() == [[skipped]]
    good = drafts(["0", "1"], failed_below=1.0, when_failed=rule)
    assert good.refinements.prompts == ["q -> 1"]
    assert not good.failed.any()


def test_failure_is_of_all_drafts_not_of_the_chosen_one():
    rule = Fallback.PLAIN_PROMPT
    worst = drafts(["0", "1"], select=select_worst_draft, failed_below=1.0, when_failed=rule)
    assert worst.refinements.prompts == ["q -> 0"]


@pytest.mark.parametrize(
    ("rule", "skipped"), [(Fallback.PLAIN_PROMPT, False), (Fallback.SKIP, True)]
)
def test_no_draft_scored(rule, skipped):
    rollouts = drafts(["none", "none"], when_unscored=rule)
    assert rollouts.refinements.prompts == ["q"]
    assert rollouts.found.tolist() == [False]
    assert rollouts.skipped.tolist() == [skipped]
    assert not rollouts.conditioned.any()
    assert math.isnan(rollouts.groups[0].choices[0].reward)


def test_skipped_prompts_leave_the_others_their_seeds():
    keep, skip = (
        DraftRules(failed_below=2.0),
        DraftRules(failed_below=2.0, when_failed=Fallback.SKIP),
    )
    all_of_them = both(PROMPTS * 4, canned, graded, rules=keep, seed=9)
    some = both(PROMPTS * 4, canned, graded, rules=skip, seed=9)
    assert 0 < some.skipped.sum() < 20
    for whole, part in zip(all_of_them, some, strict=True):
        assert part == whole or part.choices[0].skipped


def test_an_empty_draft_gives_the_plain_prompt():
    thinking = listed("<think>never ends", "0")
    rollouts = two_stage_rollout(
        ["q"], thinking, lambda prompts, completions: [1.0], num_drafts=1, num_refinements=1
    )
    assert rollouts.refinements.prompts == ["q"]
    assert rollouts.chosen.tolist() == [0]
    assert not rollouts.conditioned.any()


def test_draft_dropout():
    always = drafts(["1"], dropout=1.0)
    assert always.refinements.prompts == ["q"]
    assert always.dropped.tolist() == [True]
    assert always.chosen.tolist() == [0]
    whole = both(PROMPTS * 20, canned, graded, seed=2)
    half = both(PROMPTS * 20, canned, graded, rules=DraftRules(dropout=0.5), seed=2)
    assert 30 < half.dropped.sum() < 70
    assert not whole.dropped.any()
    for full, dropped in zip(whole, half, strict=True):
        assert dropped == full or dropped.choices[0].dropped


def test_later_rounds_take_the_best_so_far():
    rollouts = two_stage_rollout(
        ["q"],
        listed("1", "0", "3", "2", "4", "4"),
        by_text,
        num_drafts=2,
        num_refinements=2,
        rounds=2,
        rules=ARROW,
    )
    assert [s.prompt for s in rollouts.groups[0].refinements] == ["q -> 1", "q -> 3"]
    assert [c.index for c in rollouts.groups[0].choices] == [0, 2]
    assert drafts(["5", "0"], rounds=3).refinements.prompts == ["q -> 5"]
    both(PROMPTS, canned, graded, rounds=3, seed=1, rules=DraftRules(dropout=0.3))


def test_what_was_cut_is_told():
    rollouts = both(
        [[1, 2]] * 9,
        canned,
        lambda prompts, completions: [1.0] * len(completions),
        rules=DraftRules(splice=TokenSplice(max_draft_tokens=1)),
        seed=8,
    )
    first = rollouts.draft_lengths[:, 0]
    assert rollouts.tokens_cut.tolist() == (first - 1).clamp(min=0).tolist()
    assert rollouts.tokens_cut.max() == 2
    assert [len(prompt) for prompt in rollouts.refinements.prompts] == (2 + first.sign()).tolist()


# The stream: order, slots, cancellation.


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


class Engine:
    """Keeps requests open until `answer`; the reward of a text is the text."""

    def __init__(self):
        self.open = {}
        self.began = []
        self.cancelled = []

    async def sample_one(self, prompt, n, *, seed=None):
        future = asyncio.get_running_loop().create_future()
        name = prompt
        if prompt in self.began:
            name = f"{prompt}#{self.began.count(prompt)}"
        self.open[name] = future
        self.began.append(prompt)
        try:
            text = await future
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        finally:
            del self.open[name]
        return [Completion([1], text)] * n

    async def answer(self, name, text):
        self.open[name].set_result(text)
        await settle()


class Consumer:
    """Takes groups off a stream as they come."""

    def __init__(self, stream):
        self.stream = stream
        self.groups = []
        self.task = asyncio.create_task(self.run())

    async def run(self):
        async with aclosing(self.stream):
            async for group in self.stream:
                self.groups.append(group.index)


def in_loop(test):
    """Run a test inside an event loop and check that it leaves no task behind."""

    @functools.wraps(test)
    def run(*arguments, **fixtures):
        async def body():
            await test(*arguments, **fixtures)
            await settle()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(body(), debug=True)
        gc.collect()

    return run


@in_loop
async def test_no_prompt_waits_for_another_ones_drafts():
    engine = Engine()
    got = Consumer(stream_two_stage_rollout(["a", "b"], engine, by_text, rules=ARROW))
    await settle()
    assert engine.began == ["a", "b"]
    await engine.answer("b", "1")
    await engine.answer("b -> 1", "2")
    assert got.groups == [1]
    await engine.answer("a", "1")
    await engine.answer("a -> 1", "2")
    await got.task
    assert got.groups == [1, 0]


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
    assert got.groups == [0, 1, 2]


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
    assert got.groups == [0, 1, 2, 3]


@pytest.mark.parametrize("options", [{}, {"reward_max": 1.0}])
def test_a_sampler_that_takes_a_priority_is_told_the_stage(options):
    class Engine:
        async def sample_one(self, prompt, n, *, seed=None, priority=None):
            told.add((prompt, priority))
            return [Completion([1], "1")] * n

    told = set()
    streamed(["a"], Engine(), by_text, rounds=2, rules=ARROW, **options)
    assert told == {("a", 0), ("a -> 1", 1), ("a -> 1", 2)}


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
    assert got.groups == [1, 2]
    assert sorted(engine.open) == ["a", "d"]
    for name in ("a", "d", "d -> 1", "a -> 1"):
        await engine.answer(name, "1")
    await got.task
    assert got.groups == [1, 2, 3, 0]
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


@pytest.mark.parametrize("run", [two_stage_rollout, streamed])
def test_a_reward_that_raises_names_its_prompt(run):
    def reward(prompts, completions):
        if prompts[0] == "q3":
            raise KeyError("answer")
        return graded(prompts, completions)

    with pytest.raises(RewardError, match=r"reward failed on prompt 3 \('q3'\): KeyError"):
        run(PROMPTS, canned, reward)


@pytest.mark.parametrize("run", [two_stage_rollout, streamed])
def test_a_reward_that_returns_another_number_of_values(run):
    with pytest.raises(ValueError, match="3 values for 4 completions of prompt 0"):
        run(["q"], canned, lambda prompts, completions: [1.0] * 3)


def test_a_sampler_in_threads_can_be_left():
    async def main():
        stream = stream_two_stage_rollout(PROMPTS, canned, graded, seed=1)
        async with aclosing(stream):
            return (await anext(stream)).index

    assert asyncio.run(main()) in range(5)


def test_a_finished_journal_draws_nothing(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = streamed(PROMPTS, canned, graded, seed=1, journal=path)
    again = streamed(PROMPTS, listed(), graded, seed=1, journal=path)
    assert again == first


def test_a_journal_of_other_prompts_or_sizes_is_refused_at_once(tmp_path):
    path = tmp_path / "journal.jsonl"
    streamed(PROMPTS, canned, graded, seed=1, journal=path)
    with pytest.raises(ValueError, match=r"has prompts = .*, this one"):
        stream_two_stage_rollout(PROMPTS[::-1], canned, graded, seed=1, journal=path)
    for change in ({"num_drafts": 2}, {"num_refinements": 8}, {"rounds": 2}, {"seed": 2}):
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=f"has {name} = [14], this one {value}"):
            stream_two_stage_rollout(PROMPTS, canned, graded, **{"seed": 1, **change}, journal=path)
    with pytest.raises(TypeError, match="JSON"):
        stream_two_stage_rollout(
            [[{"role": "user", "content": b"bytes"}]], canned, graded, num_drafts=0, journal=path
        )


# Progress and times.


@pytest.mark.parametrize("run", [two_stage_rollout, streamed])
def test_progress_tells_each_stage_of_each_prompt(run):
    events = []
    rollouts = run(PROMPTS, canned, graded, seed=1, rounds=2, on_progress=events.append)
    for group in rollouts:
        mine = [event for event in events if event.index == group.index]
        assert [event.number for event in mine] == [0, 0, 1, 1, 2, 2]
        assert [event.last for event in mine[1::2]] == [False, False, True]
        assert [event.stage for event in mine[1::2]] == [group.drafts, *group.refinements]
        assert [event.time for event in mine[::2]] == [
            stage.started for stage in (group.drafts, *group.refinements)
        ]
    times = rollouts.times.flatten(1)
    assert (times.diff(dim=1) >= 0).all()
    assert (times >= 0).all()


@pytest.mark.parametrize("run", [two_stage_rollout, streamed])
def test_progress_tells_of_skipped_prompts_too(run):
    events = []
    rules = DraftRules(failed_below=3.0, when_failed=Fallback.SKIP)
    run(["q"], canned, graded, on_progress=events.append, rules=rules)
    assert [type(event) for event in events] == [StageStarted, StageFinished, StageFinished]
    assert events[-1].last
    assert [c.finish_reason for c in events[-1].stage.completions] == ["skipped"] * 4
    assert not any(c.token_ids for c in events[-1].stage.completions)


# What is refused, before anything is drawn.


@pytest.mark.parametrize("run", [two_stage_rollout, stream_two_stage_rollout])
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_drafts": -1}, ValueError, "num_drafts must be >= 0, got -1"),
        ({"num_refinements": 0}, ValueError, "num_refinements must be >= 1, got 0"),
        ({"rounds": 0}, ValueError, "rounds must be >= 1, got 0"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"rules": "best"}, TypeError, "rules must be DraftRules, got str 'best'"),
        ({"on_progress": 1}, TypeError, "on_progress must be callable, got int 1"),
        ({"columns": {"answer": ["1"]}}, ValueError, "1 values for 2 prompts"),
        ({"rules": DraftRules(splice=TokenSplice())}, TypeError, "pass splice=TextSplice"),
    ],
)
def test_wrong_options(run, options, error, match):
    with pytest.raises(error, match=match):
        run(["a", "b"], listed(), by_text, **options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"concurrency": 0}, ValueError, "concurrency must be >= 1, got 0"),
        ({"reward_max": math.inf}, ValueError, "reward_max must be finite"),
        ({"reward_max": 1, "num_drafts": 0}, ValueError, "reward_max has no effect"),
        *(
            ({"reward_max": 1, "rules": rules}, ValueError, "reward_max needs the best draft")
            for rules in (
                DraftRules(ties=Ties.SHORTEST),
                DraftRules(selection_score=by_text),
                DraftRules(select_worst_draft),
            )
        ),
    ],
)
def test_wrong_options_of_the_stream(options, error, match):
    with pytest.raises(error, match=match):
        stream_two_stage_rollout(["a", "b"], listed(), by_text, **options)


def test_a_prompt_that_cannot_take_a_draft_is_named_before_sampling():
    with pytest.raises(TypeError, match="pass splice=TokenSplice") as error:
        two_stage_rollout(["a", [1, 2]], listed(), by_text)
    assert error.value.__notes__ == ["at prompts[1], before sampling"]
    with pytest.raises(ValueError, match="user message"):
        two_stage_rollout([[{"role": "system", "content": "s"}]], listed(), by_text)


def test_a_sampler_that_returns_too_few():
    with pytest.raises(ValueError, match="n = 4 completions per prompt, got 1"):
        two_stage_rollout(["q"], lambda prompts, n, seed: [[Completion([], "")]], by_text)


def test_a_reward_that_changes_its_prompts_changes_nothing_else():
    def vandal(prompts, completions):
        for prompt in prompts:
            prompt[0]["content"] = "changed"
        return [1.0] * len(completions)

    chat = [{"role": "user", "content": "q"}]
    rollouts = both([chat], canned, vandal, rules=ARROW, seed=1)
    assert chat == rollouts.prompts[0] == [{"role": "user", "content": "q"}]
    assert rollouts.refinements.prompts[0][0]["content"].startswith("q -> ")


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


def test_skipped_prompts_stay_skipped_in_later_rounds():
    rules = DraftRules(failed_below=3.0, when_failed=Fallback.SKIP)
    rollouts = both(PROMPTS, canned, graded, rounds=2, num_refinements=3, rules=rules, seed=1)
    assert rollouts.skipped.all()
    assert rollouts.refinement_rewards.shape == (5, 3)
    assert rollouts.refinement_rewards.isnan().all()
    assert rollouts.chosen.tolist() == rollouts.until_round(1).chosen.tolist()
