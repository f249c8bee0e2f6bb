"""`igrpo train` end to end on a tiny model: files, resume after a kill, refusals."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner, Result

from igrpo_algo.cli.app import app
from igrpo_algo.cli.run_folder import last_checkpoint
from igrpo_algo.cli.train import FREE_ON_RESUME, as_dataset
from igrpo_algo.files import sole_writer
from igrpo_algo.trainers.trl.config import IGRPOConfig

# Warnings that TRL and its dependencies give about themselves.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning:transformers",
    "ignore:.*use_reentrant.*:UserWarning",
    "ignore:.*deprecated:DeprecationWarning",
)

REWARD = "def vowels(completions, **columns):\n    return [x(c) for c in completions]\n\n\n" + (
    "def x(c):\n    return sum(map(c[-1]['content'].count, 'aeiou')) / 8\n"
)
FAST = [
    *("--set", "per_device_train_batch_size=4", "--set", "save_steps=1"),
    *("--max-completion-length", "8", "--learning-rate", "1e-3", "--temperature", "1.0"),
]


@pytest.fixture(autouse=True)
def _own_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vowel_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "vowel_rewards", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))


def arguments(model: str, problems: str, *more: str, steps: int = 2) -> list[str]:
    return [
        *("train", "--model", model, "--dataset", problems),
        *("--reward", "vowel_rewards:vowels,format", "--max-steps", str(steps)),
        *("--output-dir", "out", *FAST, *more),
    ]


def igrpo(*command: str) -> Result:
    return CliRunner().invoke(app, list(command))


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_the_try_of_getting_started_runs_as_the_page_has_it() -> None:
    page = (Path(__file__).parents[3] / "docs/use/getting_started.md").read_text()
    (code, commands) = re.search(r"```python\n(.*?)```\n\n```bash\n(.*?)```", page, re.S).groups()
    exec(code, {})
    train, evaluate = (shlex.split(line) for line in commands.replace("\\\n", "").splitlines())
    for _, *command in (train, evaluate):
        done = igrpo(*command)
        assert done.exit_code == 0, done.output
    assert (train[1], evaluate[1]) == ("train", "eval")


@pytest.mark.parametrize("sampler", ["static", "transformers"])
def test_another_sampler_draws(tiny_model: str, problems: str, sampler: str) -> None:
    done = igrpo(*arguments(tiny_model, problems, "--sampler", sampler))
    assert done.exit_code == 0, done.output
    training = [row for row in rows("out/metrics.jsonl") if "reward" in row]
    assert len(training) == 2
    # The engine was synced: its log-probs are the trainer's, in float32.
    assert max(row["sampling/sampling_logp_difference/max"] for row in training) < 1e-3
    assert json.loads(Path("out/run.json").read_text())["sampler"] == sampler
    other = igrpo(*arguments(tiny_model, problems, "--resume", steps=3))
    assert other.exit_code == 2
    assert "sampler" in other.output


def test_a_sampler_that_is_not_known_is_refused(tiny_model: str, problems: str) -> None:
    done = igrpo(*arguments(tiny_model, problems, "--sampler", "sglang"))
    assert done.exit_code == 2
    assert "--sampler must be static, transformers, vllm" in " ".join(done.output.split())


def test_train_writes_metrics_summary_and_a_model(tiny_model: str, problems: str) -> None:
    done = igrpo(*arguments(tiny_model, problems, "--eval-dataset", problems,
                            "--set", "eval_steps=2", "--reward-weights", "1,0.5"))  # fmt: skip
    assert done.exit_code == 0, done.output
    metrics = rows("out/metrics.jsonl")
    training = [row for row in metrics if "reward" in row]
    assert [row["step"] for row in training] == [1, 2]
    assert all("igrpo/best_draft_reward" in row for row in training)
    assert [row["step"] for row in metrics if "eval_reward" in row] == [2]
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["last"] == training[-1]
    record = json.loads(Path("out/run.json").read_text())
    assert record["reward_weights"] == [1.0, 0.5]
    assert Path("out/model.safetensors").exists()
    assert {"reward", "entropy/nonzero_advantage", "igrpo/copied"} <= set(done.output.split())


def test_a_finished_run_without_checkpoints_is_not_written_over(
    tiny_model: str, problems: str
) -> None:
    finished = arguments(tiny_model, problems, "--set", "save_strategy=no", steps=1)
    done = igrpo(*finished)
    assert done.exit_code == 0, done.output
    files = {path: path.read_bytes() for path in Path("out").iterdir() if path.is_file()}
    for again in (["--seed", "7"], ["--resume"]):
        refused = igrpo(*finished, *again)
        assert refused.exit_code == 2, refused.output
        assert "out holds a finished run without a checkpoint to continue" in refused.stderr
    assert {path: path.read_bytes() for path in files} == files


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def wait_for(condition: Any, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(1200):
        if condition():
            return
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    pytest.fail("the run did not get there within a minute")


def test_killed_run_resumes_to_the_same_end(tiny_model: str, problems: str) -> None:
    steady = ("--set", "lr_scheduler_type=constant")  # the runs differ in length
    command = [
        sys.executable,
        "-m",
        "igrpo_algo.cli",
        *arguments(tiny_model, problems, *steady, steps=40),
    ]
    with open("log.txt", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
        wait_for(lambda: last_checkpoint(Path("out")) is not None, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed_at = last_checkpoint(Path("out"))
    assert killed_at is not None
    step = killed_at.step
    assert step < 38
    with open("out/metrics.jsonl", "ab") as file:  # a step after the checkpoint, and a torn line
        file.write(b'{"step": %d, "reward": 9}\n{"step": 39, "rew' % (step + 1))
    # A checkpoint that was being written when the run died is passed over.
    torn = Path("out") / f"checkpoint-{step + 100}"
    shutil.copytree(killed_at.path, torn)
    (torn / "trainer_state.json").write_text('{"global_st')

    end = step + 2
    refused = igrpo(*arguments(tiny_model, problems, *steady, steps=end))
    assert refused.exit_code == 2
    assert f"holds checkpoint-{step} of an earlier run: add --resume" in refused.stderr
    other = igrpo(*arguments(tiny_model, problems, *steady, "--resume", "--seed", "7", steps=end))
    assert other.exit_code == 2
    assert "other settings (seed was None, is 7)" in other.stderr
    done = igrpo(*arguments(tiny_model, problems, *steady, "--resume", steps=end))
    assert done.exit_code == 0, done.output
    training = [row for row in rows("out/metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in training] == list(range(1, end + 1))

    whole = igrpo(*arguments(tiny_model, problems, *steady, "--output-dir", "whole", steps=end))
    assert whole.exit_code == 0, whole.output
    straight = [row for row in rows("whole/metrics.jsonl") if "reward" in row]
    clocks = {"step_time", "epoch"}
    for resumed, row in zip(training, straight, strict=True):
        assert {**resumed, **dict.fromkeys(clocks)} == {**row, **dict.fromkeys(clocks)}
    assert rows("out/metrics.jsonl") == training  # no closing line, which a resume makes wrong


def test_resume_without_a_checkpoint_starts_afresh_and_adapters_evaluate(
    tiny_model: str, problems: str
) -> None:
    done = igrpo(*arguments(tiny_model, problems, "--resume", "--peft-r", "2", steps=1))
    assert done.exit_code == 0, done.output
    assert Path("out/adapter_model.safetensors").exists()
    scored = igrpo(
        *("eval", "--model", "out", "--dataset", problems, "--reward", "vowel_rewards:vowels"),
        *("--samples", "1", "--limit", "1", "--max-new-tokens", "2", "--output-dir", "scores"),
    )
    assert scored.exit_code == 0, scored.output
    assert json.loads(Path("scores/summary.json").read_text())["single"]["answers"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reward", "maths"], "reward must be one of math, exact, format"),
        (["--reward", "format, format"], "--reward names 'format' twice"),
        (["--eval-split", "dev"], "--eval-split has no effect without --eval-dataset"),
        (["--learning-rate", "nan"], "learning_rate must be >= 0, got nan"),
        (["--set", "learning_rate=-1"], "learning_rate must be >= 0, got -1"),
        (["--temperature", "0"], "temperature must be > 0, got 0.0"),
        (["--set", "top_p=2"], "top_p must be <= 1, got 2"),
        (["--max-completion-length", "0"], "max_completion_length must be >= 1, got 0"),
        (["--max-steps", "0"], "max_steps must be >= 1, got 0"),  # would make an update at rate 0
        (["--set", "max_steps=-5"], "max_steps must be >= 1, got -5"),
        (["--reward", "nowhere:f"], "reward module 'nowhere' could not be imported"),
        (["--reward-weights", "1"], "must have one number per reward: 1 for 2"),
        (
            ["--reward-weights", "1,b"],
            "--reward-weights wants numbers separated by commas, got '1,b'",
        ),
        (["--set", "learning_rat=1"], "no field 'learning_rat'; did you mean learning_rate"),
        (["--set", "learning_rate"], "--set wants key=value, got 'learning_rate'"),
        (["--set", "num_drafts=3.5"], "num_drafts must be int, got 3.5"),
        (["--set", "use_vllm=yes"], "use_vllm must be bool, got 'yes'"),
        (["--set", "beta=true"], "beta must be int or float, got True"),
        (["--set", "output_dir=x"], "output_dir is given by --output-dir"),
        (["--set", "resume_from_checkpoint=x"], "resume_from_checkpoint is given by --resume"),
        (["--set", "do_predict=true"], "do_predict is decided by the command"),
        (["--set", "eval_strategy=steps"], "eval_strategy needs --eval-dataset"),
        (["--set", "num_generations_eval=2"], "num_generations_eval needs --eval-dataset"),
        (["--split", "dev"], "split 'dev' has no effect"),
        (["--reward-weights", "0,0"], "--reward-weights must not all be 0"),
        (["--set", "draft_choice=middle"], "draft_choice must be one of best, random, worst"),
        (["--num-refinements", "1"], "num_refinements must be >= 2, got 1"),
        (["--config", "missing.json"], "missing.json"),
        (["--config", "list.json"], "list.json: wanted a mapping, got list"),
        (["--config", "torn.json"], "torn.json: not JSON"),
        (["--config", "torn.yaml"], "torn.yaml: not YAML"),
        (["--config", "config.toml"], "config.toml: a config is .json, .yaml or .yml"),
        (["--chat-template-kwargs", "no"], "--chat-template-kwargs wants JSON, got 'no'"),
        (["--chat-template-kwargs", "[1]"], "chat_template_kwargs must be a mapping, got"),
        (["--set", 'chat_template_kwargs={"tokenize": 1}'], "must not set tokenize"),
        (["--peft-r", "0"], "--peft-r must be >= 1, got 0"),
        (["--model", "./nothing"], "model ./nothing is not a folder with a config.json"),
        (["--dataset", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--reward", "math", "--dataset", "bare.jsonl"], "no column answer or solution"),
        (["--dataset", "taken.jsonl"], "taken.jsonl has a column 'completions', which training"),
        (["--dataset", "left-out.jsonl"], "left-out.jsonl has a column 'completion', which"),
        (["--limit", "1", "--set", "steps_per_generation=4"], "takes 4 prompts"),
        (["--question-column", "q"], "question_column 'q' is not among"),
    ],
)
def test_refusals_are_one_line_before_any_model_loads(
    tiny_model: str,
    problems: str,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("list.json").write_text("[]")
    Path("torn.json").write_text("{")
    Path("torn.yaml").write_text("a: [")
    Path("config.toml").write_text("")
    Path("taken.jsonl").write_text('{"prompt": "a", "completions": "b"}')
    Path("left-out.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    Path("bare.jsonl").write_text('{"prompt": "a"}')
    monkeypatch.setattr("igrpo_algo.cli.train.run", lambda *_: pytest.fail("a model was loaded"))
    done = igrpo(*arguments(tiny_model, problems, *options))
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert not Path("out").exists()


def test_settings_come_from_preset_file_options_and_set(
    tiny_model: str, problems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr("igrpo_algo.cli.train.run", lambda job, _: jobs.append(job))
    Path("config.yaml").write_text("temperature: 0.1\nlearning_rate: 0.1\nbeta: 0.1\nseed: 1\n")
    done = igrpo(
        *("train", "--model", tiny_model, "--dataset", problems, "--reward", "math", "--paper"),
        *("--config", "config.yaml", "--learning-rate", "0.2", "--num-drafts", "8"),
        *("--set", "num_drafts=2", "--set", "beta=0.3", "--set", "save_steps=7"),
        *("--system-prompt", "paper", "--chat-template-kwargs", '{"enable_thinking": false}'),
        *("--set", "per_device_train_batch_size=2", "--set", "gradient_accumulation_steps=2"),
    )
    assert done.exit_code == 0, done.output
    (job,) = jobs
    config = job.config
    assert (config.temperature, config.learning_rate, config.num_drafts) == (0.1, 0.2, 2)
    assert (config.beta, config.seed, config.save_steps) == (0.3, 1, 7)
    assert config.chat_template_kwargs == {"enable_thinking": False}
    assert config.lr_scheduler_type == "cosine_with_min_lr"
    assert config.max_completion_length == 4096
    assert [message["role"] for message in job.rows[0]["prompt"]] == ["system", "user"]
    assert [row["answer"] for row in job.rows] == ["3", "5", "7", "9", "11", "13"]


def test_a_second_writer_is_refused(tiny_model: str, problems: str) -> None:
    with sole_writer("out"):
        refused = igrpo(*arguments(tiny_model, problems))
    assert refused.exit_code == 2
    assert "igrpo train: out is being written by another run" in refused.stderr
    assert not Path("out").exists()


def test_columns_with_cells_of_several_types_reach_the_reward() -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "a"}], "answer": None, "level": "hard"},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "b"}]}], "answer": "1",
         "level": 2},
    ]  # fmt: skip
    assert list(as_dataset(rows)) == rows


def test_help_states_defaults_and_what_may_change_on_resume() -> None:
    command: Any = get_command(app)
    train = command.commands["train"]
    helps = {parameter.name: parameter.help for parameter in train.params}
    plain = IGRPOConfig("out", use_cpu=True, bf16=False)
    paper = IGRPOConfig.paper("out", use_cpu=True, bf16=False)
    assert f"({plain.temperature}; paper {paper.temperature})" in helps["temperature"]
    lengths = f"({plain.max_completion_length}; paper {paper.max_completion_length})"
    assert lengths in helps["max_completion_length"]
    epochs = f"({plain.num_train_epochs:g} epochs; paper {paper.num_train_epochs:g})"
    assert epochs in helps["max_steps"]
    assert f"({plain.seed})" in helps["seed"]
    named = train.help.partition("only these may change:")[2].rstrip(".\n")
    assert set(named.replace(",", " ").split()) - {"and"} == FREE_ON_RESUME
