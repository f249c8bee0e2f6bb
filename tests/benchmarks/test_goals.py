"""What the kernels are to reach, and what a record shows of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import figure, run_of

from benchmarks import cases, compare, goals, gpu_check, ops, record, results
from benchmarks.goals import Goal, verdict

H100 = results.RESULTS / "2026-11-26-h100.json"


def verdicts(run: results.Record, path: Path) -> dict[str, str]:
    _, *lines = goals.lines(run, path)
    return {line[0]: line[-1] for line in lines}


def test_every_goal_is_of_a_case_that_a_gpu_measures_and_of_a_peer_that_runs_it() -> None:
    for goal in goals.goals():
        assert goal.case in cases.gpu_grid()
        assert goal.peer in (None, goals.COPY, *ops.op_of(goal.case).peers)
    options = record.parser().parse_args(["--device", "cuda"])
    assert goals.STEPS.keys() <= dict(gpu_check.steps(options, Path("run.json"))).keys()


def test_what_the_first_record_shows() -> None:
    _, *lines = goals.lines(json.loads(H100.read_text()), H100)
    by_name = {line[0]: line[1:] for line in lines}
    loss = by_name["linear_policy_loss, forward and backward, bf16, T=8192 H=4096 V=151936"]
    assert loss == ["Liger Triton", "0.96", "1.26", "1.10", "1.64", "missed"]
    scores = by_name["token_logprobs, forward, bf16, T=8192 V=151936"]
    assert scores == [goals.COPY, "1.09", "1.15", "", "", "missed"]  # 87 % of 92 %
    assert by_name["train-step"] == ["TRL", "0.98", "0.99", "1.00", "1.48", "missed"]
    assert by_name["shared-prompt-one-group"][-1] == "not yet measured"


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        (None, "not yet measured"),
        ((0.9, None), "not yet measured"),
        ((0.9, 1.1), "met"),
        ((0.91, 1.1), "missed"),
        ((0.9, 1.11), "missed"),
    ],
)
def test_both_parts_of_a_goal_have_to_be_met(shares: Any, said: str) -> None:
    assert verdict(shares, 0.9, 1.1) == said


def test_a_goal_by_name_is_over_that_peer_and_others_over_the_fastest() -> None:
    (case,) = {goal.case for goal in goals.goals() if goal.peer == "torch.compile"}
    ours = figure("igrpo", 4.0, case, peak_bytes=2**29)
    peers = figure("TRL", 2.0, case), figure("torch.compile", 5.0, case)
    (row,) = compare.rows(run_of(ours, *peers))
    assert goals.shares_of(Goal(case, 1.0, None, "torch.compile"), row) == (0.8, 0.5)
    assert goals.shares_of(Goal(case, 1.0), row) == (2.0, 0.5)
    assert goals.shares_of(Goal(case, 1.0, None, "Liger"), row) is None
    assert goals.shares_of(Goal(case, 1.0, None, goals.COPY), row) == (2.0, None)


def test_whole_steps_are_read_from_beside_the_record(tmp_path: Path) -> None:
    figures = {
        "igrpo": {"ms": {"median": 9.0}, "peak_bytes": 80},
        "TRL": {"ms": {"median": 10.0}, "peak_bytes": 100},
    }
    padded = {"speedup_of_shared": {"median": 1.5}, "memory_over_shared": 1.2}
    row = {"forms": {"padded": padded}}
    path = tmp_path / "run.json"
    run = run_of() | {"device": "cuda"}
    assert verdicts(run, path)["train-step"] == "not yet measured"
    for name, step in {
        "train-step": {"figures": figures},
        "shared-prompt-one-group": {"rows": [row]},
        "shared-prompt-short-groups": {"rows": [row]},
    }.items():
        (tmp_path / f"run-{name}.json").write_text(json.dumps(step))
    found = verdicts(run, path)
    assert found["train-step"] == "met"
    assert found["shared-prompt-one-group"] == "missed"  # 1.6 times as fast is wanted
    assert found["shared-prompt-short-groups"] == "met"
    assert verdicts(run_of(), path)["train-step"] == "not yet measured"  # a rehearsal on a CPU
    figures.pop("TRL")
    (tmp_path / "run-train-step.json").write_text(json.dumps({"figures": figures}))
    assert verdicts(run, path)["train-step"] == "not yet measured"
