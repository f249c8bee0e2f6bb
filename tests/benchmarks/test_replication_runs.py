"""The replication's runs: arms through the library's values, records, resuming, the command."""

import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.replication import __main__ as command
from benchmarks.replication import measures, runs, sweep, training
from benchmarks.replication.arms import (
    ARMS,
    LADDER,
    MAIN,
    MORE,
    STRIPPED,
    THINKING,
    baseline_of,
    planned,
)
from benchmarks.replication.models import held_out_problems, load
from benchmarks.replication.runs import Run
from benchmarks.replication.tasks import TASKS, ask
from benchmarks.replication.training import Settings, build_sampler, configure, splice_of
from igrpo_algo import (
    DraftRules,
    Rollouts,
    TextSplice,
    standardize_by_group,
    strip_thinking,
    two_stage_rollout,
)
from igrpo_algo.cli.demo.model import build_tokenizer
from igrpo_algo.drafts.markers import marker_tokens
from igrpo_algo.rollouts.completions import Completion

TINY = Settings(steps=2, prompts=4, evaluations=1, held_out=8, samples=2, rounds=2, warm_up_steps=2)
RUN = Run("chain", "64x2", "both-worst", 0)


def draw(run: Run, folder: Path, settings: Settings = TINY) -> dict:
    """Do a run in this process and read its record."""
    weights = folder / "weights"
    runs.warm(run.task, run.size, settings, weights)
    runs.do(run, settings, folder, weights)
    record = runs.read_record(run, folder)
    assert record is not None
    return record


@pytest.mark.parametrize("name", ARMS)
def test_each_arm_is_a_configuration_of_the_trainer(name: str) -> None:
    args = configure(ARMS[name], TINY, TASKS["chain"])
    assert (args.num_drafts, args.num_refinements) == (
        ARMS[name].num_drafts,
        ARMS[name].num_refinements,
    )
    assert ARMS[name].completions == (4 if name == "grpo-half" else 8)
    assert args.generation_batch_size == TINY.prompts * ARMS[name].num_refinements
    assert args.scale_rewards == "group"  # what `training_batch` does by default
    assert baseline_of(name) in ARMS
    assert ARMS[baseline_of(name)].num_drafts == 0


@pytest.mark.parametrize(("arm", "task"), [("two-rounds", "packing"), ("best-gspo", "signs")])
def test_a_run_is_recorded_with_all_that_it_cost(arm: str, task: str, tmp_path: Path) -> None:
    record = draw(Run(task, "64x2", arm, 3), tmp_path)
    assert (record["status"], record.get("error")) == ("finished", None)
    assert (record["arm"], record["seed"], record["task"]) == (arm, 3, task)
    assert [point["step"] for point in record["curve"]] == [0, 1]
    assert [row["step"] for row in record["steps"]] == [1, 2]
    final = record["final"]
    assert final["completions"] == 2 * 4 * 8
    assert 64 <= final["sampled_tokens"] <= 64 * TASKS[task].answer_tokens
    assert final["cpu_seconds"] > 0
    assert len(final["refined"]) == 2
    assert final["pass_at_k"]["1"] == pytest.approx(final["sampled"], abs=1e-4)
    for share in (final["greedy"], final["sampled"], *final["refined"]):
        assert 0 <= share <= 1


def test_the_same_run_gives_the_same_numbers(tmp_path: Path) -> None:
    first, second = (draw(RUN, tmp_path / name) for name in "ab")
    for record in (first, second):
        for point in (*record["curve"], record["final"]):
            for name in ("seconds", "cpu_seconds"):
                del point[name]
        del record["began"]
    assert first == second


def test_no_draft_shown_is_grpo_with_half_of_the_completions(tmp_path: Path) -> None:
    """The same problems, samples and updates: two ways through the library agree to the bit."""
    half, none = (draw(Run("chain", "64x2", arm, 1), tmp_path) for arm in ("grpo-half", "none"))
    assert half["final"]["trained_tokens"] > 0
    for name in ("sampled", "refined", "greedy", "entropy", "trained_tokens"):
        assert half["final"][name] == none["final"][name]
    assert 2 * half["final"]["completions"] == none["final"]["completions"]


def test_what_ended_is_not_done_again_and_what_died_is(tmp_path: Path) -> None:
    assert runs.is_open(RUN, TINY, tmp_path)
    draw(RUN, tmp_path)
    assert not runs.is_open(RUN, TINY, tmp_path)
    with pytest.raises(ValueError, match="made with other settings"):
        runs.is_open(RUN, replace(TINY, steps=3), tmp_path)
    path = RUN.record(tmp_path)
    record = json.loads(path.read_text())
    for status, is_open in (("died", True), ("diverged", False)):
        path.write_text(json.dumps({**record, "status": status}))
        assert runs.is_open(RUN, TINY, tmp_path) is is_open


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (training.DivergenceError("the loss is not finite"), "diverged"),
        (ValueError("logprobs must be finite, got nan for token 0"), "diverged"),
        (ValueError("logprobs must hold one number per token"), "died"),
        (MemoryError("no memory"), "died"),
    ],
)
def test_a_run_that_ends_badly_is_recorded_as_such(error, status, tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(runs, "train", fail)
    record = draw(RUN, tmp_path)
    assert record["status"] == status
    assert str(error) in record["error"]
    assert len(record["curve"]) == 1  # what was measured before stays


def test_weights_that_are_no_numbers_any_more_are_a_divergence(tmp_path: Path, monkeypatch) -> None:
    def spoil(*arguments):
        model, tokenizer = load(*arguments)
        torch.nn.init.constant_(model.lm_head.weight, math.nan)
        return model, tokenizer

    monkeypatch.setattr(runs, "load", spoil)
    assert draw(RUN, tmp_path)["status"] == "diverged"


SWEEP = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from benchmarks.replication.sweep import prepare_worker
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare_worker)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


def test_an_idle_worker_ends_with_a_sweep_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed_sweep.py"
    script.write_text(SWEEP)
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(command.ROOT)},
    ) as sweep:  # fmt: skip
        worker = int(sweep.stdout.readline())
        sweep.kill()
    deadline = time.monotonic() + 60
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A warmed model and the drafts and refinements of a few problems."""
    folder = tmp_path_factory.mktemp("weights")
    task = TASKS["chain"]
    runs.warm("chain", "64x2", TINY, folder)
    model, tokenizer = load(task, "64x2", runs.warm_path("chain", "64x2", TINY, folder))
    problems = held_out_problems(task, 8)
    rollouts = two_stage_rollout(
        [ask(problem) for problem in problems], build_sampler(model, tokenizer, task), task.reward,
        num_drafts=6, num_refinements=2, columns={"problem": problems}, seed=5,
    )  # fmt: skip
    return model, tokenizer, task, problems, rollouts


def test_the_gradient_is_that_of_refinements_and_of_weighted_drafts(world) -> None:
    """Against the formula, one completion at a time: mean of A log p over tokens, then over B."""
    model, tokenizer, task, _, rollouts = world
    args = configure(ARMS["both-worst-6-2"], TINY, task)
    model.zero_grad()
    training.accumulate_gradients(model, rollouts, args, pad=tokenizer.pad_token_id)
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    for number, weight, rewards in (
        (0, 3.0, rollouts.draft_rewards), (1, 1.0, rollouts.refinement_rewards),
    ):  # fmt: skip
        advantages = standardize_by_group(rewards)
        for row, rollout in zip(advantages, rollouts, strict=True):
            stage = rollout.stages[number]
            for advantage, completion in zip(row, stage.completions, strict=True):
                ids = torch.tensor([stage.prompt_ids + completion.token_ids])
                logprobs = model(ids, use_cache=False).logits[0].log_softmax(-1)
                count = len(completion.token_ids)
                targets = ids[0, -count:, None]
                mean = logprobs[-count - 1 : -1].gather(-1, targets).mean()
                (-weight * advantage * mean / rewards.numel()).backward()
    norm = torch.cat([grad.flatten() for grad in ours.values()]).norm()
    assert norm > 1e-3
    for name, parameter in model.named_parameters():
        # fp32 sums in another order: errors are of the rounding of the whole gradient.
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5 * float(norm))
    model.zero_grad()


def test_under_the_question_a_refinement_weighs_what_it_is_likely_there(world) -> None:
    """Against the formula: all completions one group, min(p(token | q) / p(token | q'), 1) A."""
    model, tokenizer, task, _, rollouts = world
    arm = ARMS["question-worst-6-2"]
    args = configure(arm, TINY, task)
    assert (arm.question_coef, args.draft_loss_coef) == (4.0, 0.0)

    def gradients() -> torch.Tensor:
        found = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        model.zero_grad(set_to_none=False)
        return found

    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    training.accumulate_gradients(model, rollouts, args, pad=tokenizer.pad_token_id)
    refinements = gradients()
    training.accumulate_gradients(
        model, rollouts, args, pad=tokenizer.pad_token_id, question_coef=arm.question_coef
    )
    ours = gradients() - refinements
    rewards = torch.cat([rollouts.draft_rewards, rollouts.refinement_rewards], 1)
    below = 0
    for row, rollout in zip(standardize_by_group(rewards), rollouts, strict=True):
        drawn = [completion for stage in rollout.stages for completion in stage.completions]
        for advantage, completion in zip(row, drawn, strict=True):
            ids = torch.tensor([rollout.drafts.prompt_ids + completion.token_ids])
            logprobs = model(ids, use_cache=False).logits[0].log_softmax(-1)
            count = len(completion.token_ids)
            logprobs = logprobs[-count - 1 : -1].gather(-1, ids[0, -count:, None])[:, 0]
            ratio = (logprobs.detach() - torch.tensor(completion.logprobs)).exp()
            below += int((ratio < 0.9).sum())
            mean = (ratio.clamp(max=1.0) * logprobs).mean()
            (-4.0 * advantage * mean / rewards.numel()).backward()
    wanted = gradients()
    assert below > 10
    assert wanted.norm() > 1e-3
    # fp32 sums in another order: errors are of the rounding of the whole gradient.
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-5 * float(wanted.norm()))


def test_training_moves_all_weights_and_none_without_a_gradient(world) -> None:
    model, tokenizer, task, problems, _ = world
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    sampler, held_out = build_sampler(model, tokenizer, task), frozenset(problems)

    def train(task) -> tuple[int, set[bool]]:
        steps = training.train(model, sampler, task, ARMS["grpo"], TINY, 0, held_out)
        tokens = sum(step.trained_tokens for step in steps)
        moved = {not torch.equal(w, before[name]) for name, w in model.state_dict().items()}
        model.load_state_dict(before)
        return tokens, moved

    tokens, moved = train(task)
    assert tokens > 0
    assert moved == {True}
    equal_rewards = replace(task, score=lambda text, problem: 0.0)
    assert train(equal_rewards) == (0, {False})


def test_a_step_is_measured_by_the_library_s_metrics(world) -> None:
    *_, rollouts = world
    found = measures.of_step(rollouts, TextSplice())
    drafts, refinements = rollouts.draft_rewards, rollouts.refinement_rewards
    assert found["accuracy"] == pytest.approx(drafts.mean().item(), abs=1e-6)
    assert found["uplift"] == pytest.approx((refinements.mean() - drafts.mean()).item(), abs=1e-6)
    spread = (refinements.amax(-1) == refinements.amin(-1)).float().mean().item()
    assert found["zero_variance"] == pytest.approx(spread, abs=1e-6)
    assert found["shown"] == 1.0
    right = drafts.amax(-1) == 1
    assert found["after_right"] == pytest.approx(refinements[right].mean().item(), abs=1e-6)


def test_without_drafts_a_step_has_no_numbers_of_drafts(world) -> None:
    model, tokenizer, task, problems, _ = world
    rollouts = two_stage_rollout(
        [ask(problem) for problem in problems], build_sampler(model, tokenizer, task), task.reward,
        num_drafts=0, num_refinements=4, columns={"problem": problems}, seed=5,
    )  # fmt: skip
    found = measures.of_step(rollouts, TextSplice())
    missing = {"draft_zero_variance", "uplift", "copy_rate", "after_right", "after_wrong"}
    assert {name for name, value in found.items() if math.isnan(value)} == missing
    assert found["reward"] == pytest.approx(rollouts.refinement_rewards.mean().item(), abs=1e-6)


def test_draft_then_refine_refines_the_answer_before_whatever_it_was_worth() -> None:
    seen: list[str] = []

    def sampler(prompts, n, seed):
        seen.extend(prompt[0]["content"] for prompt in prompts)
        return [[Completion([len(seen)], str(len(seen)), [-0.5])] for _ in prompts]

    two_stage_rollout(
        [[{"role": "user", "content": "q"}]], sampler, lambda completions, **_: [-len(seen)],
        num_drafts=1, num_refinements=1, rounds=3, rules=DraftRules(measures.latest),
    )  # fmt: skip
    assert [text[-1] for text in seen] == ["q", "1", "2", "3"]


def test_means_leave_out_what_is_not_known() -> None:
    rows = [{"a": 1.0, "b": math.nan}, {"a": 2.0, "b": 3.0}, {"a": 6.0, "b": math.nan}]
    assert measures.mean_of(rows) == {"a": 3.0, "b": 3.0}
    assert math.isnan(measures.mean_of([{"a": math.nan}])["a"])
    assert measures.share_right(torch.tensor([[1.0, 0.99], [0.0, 1.5]])) == 0.5
    pair = [Completion([1, 2], "", [-1.0, -2.0]), Completion([3], "", [-6.0])]
    assert measures.entropy_of(pair) == 3.0


def test_costs_are_counted_over_all_stages(world) -> None:
    *_, rollouts = world
    counted = runs.counts(training.Step(Rollouts(rollouts[:2].rollouts), trained_tokens=7))
    assert counted["completions"] == 2 * 8
    tokens = [len(c.token_ids) for r in rollouts[:2] for s in r.stages for c in s.completions]
    assert (counted["sampled_tokens"], counted["trained_tokens"]) == (sum(tokens), 7)


def test_what_is_planned_where() -> None:
    assert planned("chain", "64x2") == MAIN | MORE
    assert planned("thinking", "64x2") == MAIN | THINKING
    for task in TASKS:
        assert planned(task, "128x3") == planned(task, "256x4") == LADDER
    assert planned("words", "smollm2") == MAIN
    assert {baseline_of(arm) for arm in LADDER} == {"grpo", "grpo-twice"} <= {*LADDER}
    runs = sweep.plan((), ["chain", "thinking"], seeds=2, size="64x2")
    assert len(runs) == len(set(runs)) == 2 * (len(MAIN | MORE) + len(MAIN | THINKING))
    assert {run.arm for run in runs if run.task == "thinking"} == {*MAIN, *THINKING}
    assert {run.arm for run in runs[: 2 * 2 * len(MAIN)]} == {*MAIN}
    for kept, stripped in STRIPPED.items():
        options = dict(ARMS[kept].options)
        assert options.pop("strip_draft_thinking") is False
        assert options == ARMS[stripped].options


@pytest.mark.parametrize("arm", ["best", "random-tokens", "thinking-kept"])
def test_drafts_are_shown_at_test_as_in_training(arm: str) -> None:
    """With their thinking or without; never random tokens, which nobody would refine."""
    task = TASKS["thinking"]
    tokenizer = build_tokenizer(task.words)
    strip = None if arm == "thinking-kept" else strip_thinking
    splice = splice_of(ARMS[arm], TINY, task, tokenizer)
    assert splice == TextSplice(task.template, strip, marker_tokens(tokenizer))


@pytest.mark.parametrize(("arm", "shown"), [("best", "2"), ("thinking-kept", "<think>4</think>2")])
def test_thinking_is_stripped_or_shown_and_copies_counted_alike(arm: str, shown: str) -> None:
    task = TASKS["thinking"]
    tokenizer = build_tokenizer(task.words)
    texts = iter(("<think>4</think>2", "<think>4</think>2", "<think>3</think>2"))

    def sampler(prompts, n, seed):  # of one draft, then of two refinements
        return [[Completion([9], next(texts), [-0.5]) for _ in range(n)] for _ in prompts]

    rules = training.rules_of(configure(ARMS[arm], TINY, task), tokenizer)
    rollouts = two_stage_rollout(
        [[{"role": "user", "content": "7 +5"}]],
        sampler,
        lambda completions, **_: [1.0] * len(completions),
        num_drafts=1,
        num_refinements=2,
        rules=rules,
    )
    (prompt,) = rollouts[0].stages[1].prompt
    assert prompt["content"] == f"7 +5\ndraft:\n{shown}\nrefine:"
    splice = splice_of(ARMS[arm], TINY, task, tokenizer)
    # The second refinement says the same after another thought.
    assert measures.copies_of(rollouts, splice) == (1.0 if arm == "best" else 0.5)


def test_the_main_arms_come_first_and_all_arms_of_a_seed_together() -> None:
    planned = sweep.plan([*MORE, *MAIN], ["signs", "chain"], seeds=2, size="64x2")
    assert len(planned) == len(set(planned)) == 2 * 2 * len(MAIN | MORE)
    first = planned[: len(MAIN)]
    assert {(run.task, run.seed) for run in first} == {("signs", 0)}
    assert [run.arm for run in first] == list(MAIN)
    assert {run.arm for run in planned[: 4 * len(MAIN)]} == set(MAIN)


def test_the_command_does_what_is_open_and_says_what_is_missing(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(command, "SMOKE", TINY)
    monkeypatch.setattr(command, "WEIGHTS", tmp_path / "weights")
    arguments = ["--smoke", "--task", "chain", "--arm", "grpo", "--arm", "worst"]
    arguments += ["--workers", "1", "--folder", str(tmp_path / "records")]
    assert command.main(arguments) == 0
    assert "2 of 2 runs to go" in capsys.readouterr().out
    records = sorted(path.name for path in (tmp_path / "records/chain-64x2").glob("*.json"))
    assert records == ["grpo-0.json", "worst-0.json"]
    assert command.main(arguments) == 0
    assert "0 of 2 runs to go" in capsys.readouterr().out
    monkeypatch.setattr(command, "SMOKE", replace(TINY, steps=3))
    assert command.main(arguments) == 2
    assert "made with other settings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "chain", "--size", "smollm2"], "--task chain does not go with --size smollm2"),
        (["--task", "words-2"], "--task words-2 does not go with --size 64x2"),
        (["--arm", "thinking-kept"], "--arm thinking-kept is best once more on --task chain"),
        (
            ["--arm", "both-worst-thinking-kept", "--task", "words", "--size", "smollm2"],
            "--arm both-worst-thinking-kept is both-worst once more on --task words",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_runs(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(command, "sweep", lambda *_, **__: pytest.fail("a run began"))
    assert command.main([*arguments, "--folder", str(tmp_path)]) == 2
    assert said in capsys.readouterr().out


def test_a_task_that_thinks_takes_the_arms_that_show_it() -> None:
    (run,) = sweep.plan(["thinking-kept"], ["thinking"], seeds=1, size="128x3")
    assert run == Run("thinking", "128x3", "thinking-kept", 0)


@pytest.mark.parametrize("option", ["--seeds", "--workers"])
@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_the_command_wants_counts(option: str, count: str, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main([option, count])
    assert f"argument {option}: must be a count from 1 on, got '{count}'" in capsys.readouterr().err


def test_a_worker_that_is_killed_leaves_a_message(monkeypatch, capsys, tmp_path: Path) -> None:
    def kill(*_: object, **__: object) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr(command, "sweep", kill)
    assert command.main(["--smoke", "--folder", str(tmp_path)]) == 1
    assert "the same command goes on" in capsys.readouterr().out
