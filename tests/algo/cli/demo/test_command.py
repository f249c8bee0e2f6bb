"""`igrpo demo`: its runs, its workers, its files, and that a killed one goes on where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from igrpo_algo.cli.demo import command, workers
from igrpo_algo.cli.demo.runs import ARMS, DEFAULT_ARMS, DemoConfig, Run, share_runs
from igrpo_algo.cli.metrics_file import MetricsFile, write_json
from igrpo_algo.cli.run_folder import save_settings
from igrpo_algo.files import sole_writer

TINY = DemoConfig(steps=10, prompts_per_step=4, evaluations=2, held_out=20, final_samples=1)
RUNS = [Run("grpo", 0), Run("igrpo", 0), Run("both-worst", 0)]

app = typer.Typer()
app.command()(command.demo)


def invoke(*arguments: str):
    return CliRunner().invoke(app, [*arguments], catch_exceptions=False)


def finish(run: Run, output_dir: Path, accuracy: float) -> None:
    """Write what a finished run leaves."""
    metrics = run.metrics(output_dir)
    for step in (0, 100):
        held_out = {"accuracy": accuracy, "refined_accuracy": accuracy, "entropy": 1.0}
        position = {"step": step, "completions": step * 512, "split": "held-out"}
        metrics.append({"arm": run.arm, "seed": run.seed, **position, **held_out})
    metrics.append(
        {**position, "arm": run.arm, "seed": run.seed, "split": "train", "zero_variance": 0.5}
    )
    right = [4 if index < 1000 * accuracy else 0 for index in range(1000)]
    result = {"arm": run.arm, "seed": run.seed, "accuracy": accuracy, "refined_accuracy": accuracy}
    counts = {"right": right, "refined_right": right, "cpu_seconds": 1}
    write_json(run.folder(output_dir) / "result.json", {**result, **counts})


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    save_settings(tmp_path, asdict(DemoConfig()))
    for run, accuracy in zip(RUNS, (0.9, 0.6, 0.9), strict=True):
        finish(run, tmp_path, accuracy)
    return tmp_path


def test_arms_spend_the_same_number_of_completions() -> None:
    assert {arm.completions for arm in ARMS.values()} == {8}


@pytest.mark.parametrize(
    ("steps", "evaluations", "expected"),
    [(100, 10, list(range(10, 101, 10))), (10, 4, [2, 5, 8, 10]), (2, 10, [1, 2])],
)
def test_evaluations_are_spread_and_end_with_the_last_step(steps, evaluations, expected) -> None:
    assert DemoConfig(steps=steps, evaluations=evaluations).evaluation_steps == expected


@pytest.mark.parametrize("name", ["grpo-0", "both-best-12", "random-3"])
def test_run_names_are_read_back(name: str) -> None:
    assert Run.parse(name).name == name


def test_an_unknown_arm_is_named() -> None:
    with pytest.raises(ValueError, match=r"arm must be one of grpo, .*, got 'ppo'"):
        Run.parse("ppo-0")


@pytest.mark.parametrize(("seeds", "count"), [(1, 2), (3, 2), (4, 3), (2, 8)])
def test_every_run_goes_to_one_worker(seeds: int, count: int) -> None:
    runs = [Run(arm, seed) for seed in range(seeds) for arm in ("grpo", "igrpo")]
    shares = share_runs(runs, count)
    assert sorted((run for share in shares for run in share), key=runs.index) == runs
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all(shares)


def test_a_finished_demo_trains_nothing_and_draws_again(finished: Path, monkeypatch) -> None:
    monkeypatch.setattr(command, "Workers", None)
    (finished / "curves.png").write_bytes(b"old")
    done = invoke("--output-dir", str(finished), "--seeds", "1")
    assert done.exit_code == 0
    assert "All 3 runs" in done.stdout
    assert "finished; --fresh starts again" in " ".join(done.stdout.split())
    assert "iGRPO of the paper: single-shot -30.0 points" in done.stdout
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["base_accuracy"] == 0.9
    assert summary["arms"]["igrpo"]["accuracy"] == {"mean": 0.6, "by_seed": [0.6]}
    assert summary["verdict"] + "\n" == (finished / "verdict.txt").read_text()
    assert len(MetricsFile(finished / "metrics.jsonl").read()) == 9


def test_an_interrupted_demo_says_how_to_go_on(finished: Path, monkeypatch) -> None:
    def interrupt(*arguments, **options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupt)
    done = invoke("--output-dir", str(finished), "--seeds", "2")
    assert done.exit_code == 130
    assert "3 of 6 runs to go" in done.stdout
    assert "continues from the last checkpoints" in " ".join(done.stdout.split())


def test_a_failed_worker_ends_the_demo_with_its_message(finished: Path, monkeypatch) -> None:
    stand_in(monkeypatch, "raise SystemExit('the disk is full')")
    monkeypatch.setattr(command, "POLL_SECONDS", 0.01)
    done = invoke("--output-dir", str(finished), "--seeds", "2", "--workers", "1")
    assert done.exit_code == 1
    assert done.stdout.rstrip().endswith("the disk is full")
    assert not (finished / "summary.json").exists()


def test_only_runs_without_a_result_are_trained(finished: Path, monkeypatch) -> None:
    trained: list[list[str]] = []

    def train(config, runs, output_dir, console, workers) -> None:
        trained.append([run.name for run in runs])
        for run in runs:
            finish(run, output_dir, 0.7)

    monkeypatch.setattr(command, "train", train)
    done = invoke("--output-dir", str(finished), "--seeds", "2", "--arm", "both-best")
    assert done.exit_code == 0
    assert trained == [["both-best-0", "grpo-1", "igrpo-1", "both-worst-1", "both-best-1"]]


def test_other_settings_are_refused_in_one_line(finished: Path, capsys) -> None:
    done = invoke("--output-dir", str(finished), "--steps", "7")
    assert done.exit_code == 2
    assert "other settings (steps was 100, is 7)" in done.stderr


def test_a_second_writer_is_refused(finished: Path) -> None:
    before = sorted(finished.iterdir())
    with sole_writer(finished):
        done = invoke("--output-dir", str(finished), "--seeds", "1")
    assert done.exit_code == 2
    assert "is being written by another run" in done.stderr
    assert sorted(finished.iterdir()) == before


def test_fresh_removes_what_the_demo_made_and_nothing_else(finished: Path) -> None:
    (finished / "notes.txt").write_text("mine")
    (finished / "curves.png").write_bytes(b"old")
    command.clear(finished)
    assert [path.name for path in finished.iterdir()] == ["notes.txt"]


def test_shipped_weights_are_put_in_place_once(tmp_path: Path) -> None:
    workers.prepare_weights(TINY, tmp_path, say=print)
    weights = tmp_path / "warm.safetensors"
    assert weights.read_bytes() == workers.SHIPPED_WEIGHTS.read_bytes()
    weights.write_bytes(b"others")
    workers.prepare_weights(replace(TINY, warm_up=True), tmp_path, say=print)
    assert weights.read_bytes() == b"others"


def stand_in(monkeypatch, script: str) -> None:
    """Let workers run a script instead of training."""
    monkeypatch.setattr(workers, "_python", lambda module, *names: [sys.executable, "-c", script])


def test_the_warm_up_makes_the_weights(tmp_path: Path, monkeypatch) -> None:
    script = "import sys; open(sys.argv[1], 'w').write('made by ' + sys.argv[2])"
    command = [sys.executable, "-c", script]
    monkeypatch.setattr(workers, "_python", lambda module, path: [*command, path, module])
    said: list[str] = []
    workers.prepare_weights(replace(TINY, warm_up=True), tmp_path, say=said.append)
    assert (tmp_path / "warm.safetensors").read_text() == "made by igrpo_algo.cli.demo.warmup"
    assert said == ["Warming the model up on a teacher's answers ..."]


def test_a_worker_that_fails_is_reported_with_the_end_of_its_log(tmp_path, monkeypatch) -> None:
    stand_in(monkeypatch, "raise SystemExit('the disk is full')")
    with workers.Workers(tmp_path, RUNS, 1) as pool:
        pool.processes[0].wait()
        with pytest.raises(RuntimeError, match=r"(?s)worker 0 ended with code 1; .*disk is full"):
            pool.running()


def test_workers_are_gone_when_the_demo_is(tmp_path, monkeypatch) -> None:
    stand_in(monkeypatch, "import time; time.sleep(600)")
    with workers.Workers(tmp_path, RUNS, 2) as pool:
        assert pool.running()
        assert len(pool.processes) == 2
    assert [process.poll() for process in pool.processes] == [-signal.SIGTERM] * 2


def test_progress_without_a_terminal_is_a_line_per_evaluation(capsys) -> None:
    console = command.Console()
    row = {"arm": "grpo", "seed": 0, "split": "held-out", "step": 0, "accuracy": 0.125}
    with command.RunProgress(TINY, RUNS, console) as progress:
        progress.show([row])
        progress.show([row])
        progress.show([row, {**row, "split": "train", "step": 2}, {**row, "step": 5}])
    assert capsys.readouterr().out.splitlines() == [
        "GRPO, seed 0: step 0 of 10, held-out  12.5 %",
        "GRPO, seed 0: step 5 of 10, held-out  12.5 %",
    ]


def test_a_run_whose_demo_has_ended_ends_too(tmp_path: Path, monkeypatch) -> None:
    from transformers import TrainerState

    from igrpo_algo.cli.demo.training import DemoCallback

    evaluated: list[int] = []
    metrics = RUNS[0].metrics(tmp_path)
    callback = DemoCallback(TINY, RUNS[0], metrics, lambda: evaluated.append(1))
    callback.on_step_end(None, TrainerState(global_step=1), None)
    monkeypatch.setattr(os, "getppid", lambda: callback.parent + 1)
    with pytest.raises(SystemExit, match="the demo's process has ended"):
        callback.on_step_end(None, TrainerState(global_step=5), None)
    assert evaluated == []
    assert metrics.read() == []


def start(output_dir: Path, *runs: Run) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "igrpo_algo.cli.demo.training", str(output_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *(run.name for run in runs)], env=environment)


def prepare(output_dir: Path) -> Path:
    output_dir.mkdir()
    save_settings(output_dir, asdict(TINY))
    workers.prepare_weights(TINY, output_dir, say=print)
    return output_dir


def wait_for(found, process: subprocess.Popen[bytes]) -> None:
    while not found():
        assert process.poll() is None
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_run_ends_like_one_that_was_not_killed(tmp_path: Path) -> None:
    whole, killed = prepare(tmp_path / "whole"), prepare(tmp_path / "killed")
    run = RUNS[1]
    assert start(whole, run).wait() == 0
    process = start(killed, run)
    folder = run.folder(killed)
    wait_for(lambda: list(folder.glob("checkpoint-*/trainer_state.json")), process)
    process.kill()
    process.wait()
    assert run.result(killed) is None
    # A kill may come after steps that no checkpoint holds; here it does in any case.
    run.metrics(killed).append({"split": "train", "step": 9, "completions": -1})
    assert start(killed, run).wait() == 0
    results = [run.result(output_dir) for output_dir in (whole, killed)]
    for result in results:
        del result["cpu_seconds"]
    assert results[0] == results[1]
    rows = [run.metrics(output_dir).read() for output_dir in (whole, killed)]
    assert rows[0] == rows[1]
    held_out = [row["step"] for row in rows[0] if row["split"] == "held-out"]
    assert held_out == [0, 5, 10]
    assert [row["completions"] for row in rows[0] if row["split"] == "train"][-1] == 10 * 4 * 8


@pytest.mark.slow
def test_the_demo_end_to_end(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(command, "DemoConfig", lambda **settings: replace(TINY, **settings))
    monkeypatch.setattr(command, "POLL_SECONDS", 0.1)
    done = invoke("--output-dir", str(tmp_path), "--steps", "2", "--seeds", "1")
    assert done.exit_code == 0
    rows = MetricsFile(tmp_path / "metrics.jsonl").read()
    by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in DEFAULT_ARMS}
    for own in by_arm.values():
        assert [row["step"] for row in own if row["split"] == "held-out"] == [0, 1, 2]
    assert by_arm["grpo"][0]["accuracy"] == by_arm["igrpo"][0]["accuracy"]
    trained = {arm: next(row for row in own if "reward" in row) for arm, own in by_arm.items()}
    assert {"zero_variance", "entropy", "length"} <= trained["grpo"].keys()
    assert trained["igrpo"].keys() - trained["grpo"].keys() == {
        "draft_reward",
        "best_draft_reward",
        "copy_rate",
        "entropy_nonzero_advantage",
        "draft_zero_variance",
    }
    text = (tmp_path / "verdict.txt").read_text()
    assert "Accuracy on 20 held-out problems after 64 completions" in text
    assert (tmp_path / "curves.png").exists()
    assert (tmp_path / "runs/igrpo-0/model/config.json").exists()
