"""`igrpo doctor`, the missing-extra message, and the ways to start the command."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from igrpo_algo.cli import doctor as command
from igrpo_algo.cli.app import app
from igrpo_algo.cli.extras import EXTRAS, pip_line

ROOT = Path(__file__).resolve().parents[3]
DEVICE = ("name", "capability", "memory_gib")


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_doctor_reports_this_machine_as_json() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    findings = json.loads(done.stdout)
    assert findings["torch"] == torch.__version__
    assert findings["packages"]["trl"] == metadata.version("trl")
    assert findings["commands"]["igrpo train"] == {"ready": True, "missing": [], "install": []}
    assert set(findings["ops"]) == {
        "token_logprobs", "linear_token_logprobs", "clipped_policy_loss", "linear_policy_loss",
    }  # fmt: skip
    assert findings["memory_gib"] > 0.1
    assert "of TRL's time" in findings["trainer_head"]["cpu"]


def test_doctor_says_how_fast_the_head_was_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(command.torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(command, "_device", lambda index: dict.fromkeys(DEVICE, "?"))
    done = CliRunner().invoke(app, ["doctor"])
    lines = [line.strip() for line in done.stdout.splitlines()]
    at = lines.index("loss and log-probs of IGRPOTrainer over TRL's (use_trl_loss=True)")
    assert lines[at + 1].startswith("cpu                     the loss took 0.")
    assert lines[at + 2] == "cuda:0                  not yet measured on capability (7, 5)"


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    there = command.importlib.util.find_spec
    gone = {"vllm", "peft", "trl"}
    monkeypatch.setattr(
        command.importlib.util, "find_spec", lambda name: None if name in gone else there(name)
    )
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0
    lines = {line[:36].strip(): line[36:] for line in done.stdout.splitlines()}
    assert lines["igrpo train"] == "missing trl: pip install 'igrpo[train]'"
    assert lines["igrpo train --peft-r"].endswith("pip install 'igrpo[train]' and pip install peft")
    assert lines["igrpo train --set use_vllm=true"].endswith("pip install 'igrpo[vllm]'")
    assert lines["igrpo eval"] == "ready"


def test_paths_follow_device_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    assert command._path(has_triton=True).startswith("torch on the CPU")
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    assert command._path(has_triton=False).startswith("fails on the device")
    assert command._path(has_triton=True).startswith("Triton kernels")


@pytest.mark.parametrize(
    ("command_line", "missing"),
    [
        (["--help"], "typer"),
        (["--help"], "rich"),
        (["train", "--model", "m", "--dataset", "d.jsonl", "--reward", "format"], "trl"),
        (["eval", "--model", "m", "--dataset", "d.jsonl", "--reward", "format"], "transformers"),
        (["eval", "--model", "m", "--dataset", "d.jsonl"], "math_verify"),
    ],
)
def test_a_missing_extra_is_one_line_with_its_remedy(command_line: list[str], missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv[0] = 'igrpo'\n"
        "from igrpo_algo.cli import main; main()"
    )
    done = run_python(code, *command_line)
    assert done.returncode == 1
    wanted = f"igrpo: this needs {missing}, which is not installed: pip install 'igrpo[train]'"
    assert done.stderr.strip() == wanted


def test_a_missing_module_of_no_extra_is_a_traceback() -> None:
    code = (
        "import sys; sys.modules['igrpo_algo.cli.app'] = None\n"
        "from igrpo_algo.cli import main; main()"
    )
    done = run_python(code)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['igrpo', '--help']\n"
        "from igrpo_algo.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: assert done.code == 0\n"
        "heavy = {'transformers', 'trl', 'datasets', 'accelerate', 'matplotlib', 'math_verify'}\n"
        "print('loaded', heavy & set(sys.modules))"
    )
    done = run_python(code)
    assert done.stdout.splitlines()[-1] == "loaded set()", done.stdout + done.stderr
    for name in ("train", "eval", "demo", "doctor"):
        assert f" {name} " in done.stdout


def test_pip_lines_are_the_extras_of_the_project() -> None:
    assert {module: pip_line(module) for module in ("trl.x", "vllm", "peft", "json", None)} == {
        "trl.x": "pip install 'igrpo[train]'",
        "vllm": "pip install 'igrpo[vllm]'",
        "peft": "pip install peft",
        "json": None,
        None: None,
    }
    assert set(command.NEEDS["igrpo demo"]) <= set(EXTRAS["train"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    modules = {"math-verify": "math_verify", "pyyaml": "yaml"}
    asked = [re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"]["train"]]
    assert {modules.get(name, name) for name in asked} <= set(EXTRAS["train"])
