"""The live line: every number in it, with a clock that the test moves."""

import asyncio
import io
import math
import time
from types import SimpleNamespace

import pytest
import rich
from canned_rollouts import PROMPTS, canned, graded, streamed
from rich.console import Console

from igrpo_algo import Completion, DraftRules, Fallback, stream_two_stage_rollout, two_stage_rollout
from igrpo_algo.rollouts.progress import RolloutProgress, StageFinished, StageStarted, show_live
from igrpo_algo.rollouts.records import Stage


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def finished(index, number, lengths, rewards, *, last):
    completions = [Completion([1] * length, "") for length in lengths]
    return StageFinished(index, number, Stage("q", completions, rewards), last)


def test_each_number_by_hand():
    clock, engine = Clock(), SimpleNamespace(prompt_tokens=100, cached_tokens=50)
    progress = RolloutProgress(3, sampler=engine, clock=clock)
    assert str(progress) == "0/3 done · 0 tok/s"
    clock.now = 10.0
    for index in range(3):
        progress(StageStarted(index, 0, 0.0))
    assert str(progress) == "0/3 done · 3 drafting · 0 tok/s"
    clock.now = 12.0
    progress(finished(0, 0, [3, 5], [0.0, 1.0], last=False))
    engine.prompt_tokens, engine.cached_tokens = 180, 106
    assert str(progress) == (
        "0/3 done · 2 drafting · 1 waiting · 4 tok/s · draft reward 0.50 · 70% of prompts cached"
    )
    progress(StageStarted(0, 1, 2.0))
    progress(finished(1, 0, [4, 0], [0.25, math.nan], last=False))
    assert progress.stage_counts() == {"drafting": 1, "waiting": 1, "refining": 1}
    clock.now = 14.0
    progress(finished(0, 1, [1, 3], [1.0, 0.5], last=True))
    clock.now = 99.0  # idle time after the latest event does not count
    assert str(progress) == (
        "1/3 done · 1 drafting · 1 waiting · 4 tok/s · draft reward 0.42 · refinement reward 0.75"
        " · 70% of prompts cached"
    )
    assert (progress.done, progress.tokens) == (1, 16)


def test_a_thousand_is_written_with_a_comma():
    clock = Clock()
    progress = RolloutProgress(1, clock=clock)
    progress(StageStarted(0, 0, 0.0))
    clock.now = 2.0
    progress(finished(0, 0, [3000], [math.nan], last=True))
    assert str(progress) == "1/1 done · 1,500 tok/s"


def draw(prompts, n, seed):
    return [[Completion([1, 2], "x")] * n for _ in prompts]


def zeros(prompts, completions):
    return [0.0] * len(completions)


@pytest.mark.parametrize("streamed", [False, True])
def test_rollouts_report_every_prompt_once(streamed):
    progress = RolloutProgress(4)
    options = {"num_drafts": 3, "num_refinements": 2, "rounds": 2, "on_progress": progress}
    if streamed:

        async def drain():
            stream = stream_two_stage_rollout(list("abcd"), draw, zeros, **options)
            return [group async for group in stream]

        asyncio.run(drain())
    else:
        two_stage_rollout(list("abcd"), draw, zeros, **options)
    assert (progress.done, progress.tokens) == (4, 4 * 7 * 2)
    assert progress.draft_rewards == (0.0, 12)
    assert progress.refinement_rewards == (0.0, 16)
    assert set(progress.stage_counts().values()) == {0}


def test_skipped_prompts_are_done_too():
    progress = RolloutProgress(2)
    rules = DraftRules(failed_below=1.0, when_failed=Fallback.SKIP)
    two_stage_rollout(["a", "b"], draw, zeros, on_progress=progress, rules=rules)
    assert (progress.done, progress.refinement_rewards) == (2, (0.0, 0))
    assert "refinement" not in str(progress)


def test_a_sampler_that_counts_nothing_shows_no_cache():
    progress = RolloutProgress(1, sampler=draw)
    assert progress.cached_share() is None
    assert "cached" not in str(progress)


def test_lines_are_shown_one_below_the_other_and_last_at_the_end():
    output = io.StringIO()
    console = Console(file=output, width=120)
    first, second = RolloutProgress(1, label="single-shot"), RolloutProgress(2, label="refined")
    with show_live(first, second, console=console):
        two_stage_rollout(["a"], draw, zeros, num_drafts=0, on_progress=first)
        assert output.getvalue() == "", "no terminal: nothing before the end"
    lines = output.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["single-shot", "refined"]
    assert "1/1 done" in lines[0]
    assert "0/2 done" in lines[1]


def test_a_terminal_sees_the_line_move():
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=True)
    progress = RolloutProgress(2)
    with show_live(progress, console=console):
        for _ in range(200):
            if "0/2 done" in output.getvalue():
                break
            time.sleep(0.05)
        before = output.getvalue()
        two_stage_rollout(["a"], draw, zeros, on_progress=progress)
    assert "0/2 done" in before
    assert "1/2 done" not in before
    assert "1/2 done" in output.getvalue().removeprefix(before)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="total must be an int, got float"):
        RolloutProgress(1.5)
    with pytest.raises(ValueError, match="total must be >= 0, got -1"):
        RolloutProgress(-1)
    with pytest.raises(TypeError, match="lines must be RolloutProgress, got str"), show_live("x"):
        raise AssertionError("shown all the same")


def test_the_line_is_as_wide_as_the_terminal_is_now(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rich, "_console", Console(width=20))  # made when the terminal was narrow
    monkeypatch.setenv("COLUMNS", "200")
    with show_live(RolloutProgress(0, label="x" * 60)):
        pass
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("x" * 60)
    assert line.rstrip().endswith("0/0 done · 0 tok/s")


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
