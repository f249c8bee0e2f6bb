"""The one command for a GPU, tried without one: what it runs, reads, records and says."""

import importlib.util
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check, record, samplers

NOTHING_ELSE = [
    *("--small", "--device", "cpu", "--no-tests", "--only", "clipped"),
    *("--no-memory", "--no-plots", "--without", "torch.compile"),
]


def test_the_report_of_a_red_test_is_read(tmp_path: Path) -> None:
    suite = tmp_path / "test_it.py"
    suite.write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    outcome = gpu_check.run_suite([str(suite)], 120)
    assert outcome["exit_code"] == 1
    assert (outcome["tests"], outcome["failures"]) == (2, 1)
    ((name, message),) = outcome["failed"].items()
    assert name.endswith("::test_bad")
    assert "assert 1 == 2" in message


def test_a_suite_that_is_stopped_names_what_failed_before(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    reached, limit = tmp_path / "reached", 240.0
    suite = tmp_path / "test_it.py"
    suite.write_text(
        "import pathlib, time\ndef test_bad(): assert 1 == 2\n"
        f"def test_slow(): pathlib.Path({str(reached)!r}).touch(); time.sleep(600)\n"
    )

    class OutOfTime(subprocess.Popen):
        """Its time is over once the slow test has begun."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout != limit:
                return super().wait(timeout)
            while self.poll() is None and not reached.exists():
                time.sleep(0.1)
            raise subprocess.TimeoutExpired("pytest", limit)

    monkeypatch.setattr(subprocess, "Popen", OutOfTime)
    monkeypatch.setattr(gpu_check, "PARTING_SECONDS", 60.0)
    ours = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
    try:
        outcome = gpu_check.run_suite([str(suite)], limit)
    finally:
        signal.signal(signal.SIGINT, ours)
    assert outcome["exit_code"] == "stopped after 240.0 s"
    gpu_check.tell("the suite", outcome)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("RED: the suite: exit_code stopped after 240.0 s")
    assert "::test_bad: assert 1 == 2" in second


def test_a_part_that_takes_too_long_is_stopped() -> None:
    outcome = gpu_check.run_module(["timeit", "-n1", "-r1", "import time; time.sleep(60)"], 1)
    assert outcome["exit_code"] == "stopped after 1 s"
    assert outcome["seconds"] < 30


def test_quick_and_small_choose_fewer_tests() -> None:
    parser = record.parser()
    full = gpu_check.suites(parser.parse_args(["--device", "cuda"]))
    quick = gpu_check.suites(parser.parse_args(["--device", "cuda", "--quick"]))
    assert list(full) == ["on the device", "without it", "sampler and shared prompt"]
    assert "gpu" in full["sampler and shared prompt"]
    assert list(quick) == ["on the device"]
    assert "gpu" in full["on the device"]
    assert "not gpu" in gpu_check.suites(parser.parse_args(["--device", "cpu"]))["on the device"]


@pytest.mark.parametrize(("device", "count"), [("cuda", 4), ("cpu", 3)])
def test_whole_steps_write_beside_the_record(device: str, count: int, tmp_path: Path) -> None:
    options = record.parser().parse_args(["--device", device])
    found = dict(gpu_check.steps(options, tmp_path / "run.json"))
    assert len(found) == count
    for name, (module, *arguments) in found.items():
        assert importlib.util.find_spec(module)
        assert arguments[-2:] == ["--output", str(tmp_path / f"run-{name}.json")]


def test_the_samplers_are_tried_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    samplers.main([*gpu_check.TINY_DRAWS.split(), "--output", str(path)])
    for row in json.loads(path.read_text())["rows"]:
        assert row["static_over_transformers"]["median"] > 0


@pytest.mark.parametrize(
    ("step", "code"), [(["json.tool", "--help"], 0), (["json.tool", "no such file"], 1)]
)
def test_the_whole_command_is_red_if_a_step_fails(
    step: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr(gpu_check, "steps", lambda options, path: [("train-step", step)])
    path = tmp_path / "run.json"
    assert gpu_check.main([*NOTHING_ELSE, "--output", str(path)]) == code
    written = json.loads(path.read_text())
    assert (written["steps"]["train-step"]["exit_code"] != 0) == code
    assert {"hardware", "versions", "commit", "date"} <= written.keys()
    assert written["finished"]
    printed = capfd.readouterr().out
    assert f"{'RED' if code else 'green'} after" in printed
    assert f"{'RED' if code else 'green'}: train-step: exit_code " in printed
    assert "| train-step | TRL | 0.98 |" in printed


def test_no_clock_stops_a_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []

    def run_module(arguments: Any, seconds: float | None) -> dict[str, Any]:
        limits.append(seconds)
        return {"exit_code": 0, "seconds": 0.0}

    monkeypatch.setattr(gpu_check, "run_module", run_module)
    gpu_check.main([*NOTHING_ELSE, "--output", str(tmp_path / "run.json")])
    assert limits == [None] * 3


def test_the_same_command_does_what_the_record_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped: dict[str, Any] = {"exit_code": "stopped after 1 s", "seconds": 1.0}
    outcomes = {"tests/kernels": stopped}
    ran = []

    def run_module(arguments: Any, seconds: float | None) -> dict[str, Any]:
        ran.append(arguments)
        (outcome,) = [o for word, o in outcomes.items() if word in str(arguments)] or [
            {"exit_code": 0, "seconds": 0.0}
        ]
        return outcome

    monkeypatch.setattr(gpu_check, "run_module", run_module)
    command = [*("--small", "--device", "cpu", "--only", "clipped", "--no-memory", "--no-plots")]
    command += ["--without", "torch.compile", "--output", str(tmp_path / "run.json")]
    command += ["--commit", "abc123"]
    assert gpu_check.main(command) == 1
    assert len(ran) == 1 + 3
    outcomes.clear()
    ran.clear()
    assert gpu_check.main(command) == 0
    assert len(ran) == 1  # the suite that was stopped
    assert gpu_check.main(command) == 0
    assert len(ran) == 1
    assert "to go" not in capsys.readouterr().out


def test_what_does_not_fit_the_seconds_is_left_to_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    command = [*NOTHING_ELSE, "--output", str(path), "--seconds", "60"]
    assert gpu_check.main(command) == 0
    assert json.loads(path.read_text())["steps"] == {}  # each may take 90
    assert "3 parts to go; the same command goes on" in capsys.readouterr().out


def test_a_gpu_is_demanded_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    if gpu_check.torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        gpu_check.main(["--device", "cuda"])
    assert "--device cpu --small" in capsys.readouterr().err
