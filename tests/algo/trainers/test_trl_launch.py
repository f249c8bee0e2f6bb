"""The launch lines of docs/use/many_gpus.md, on two processes: `igrpo train` under accelerate."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import trl
from safetensors.torch import load_file
from tiny_qwen import make_model, make_tokenizer, third_party

pytestmark = [third_party, pytest.mark.slow]

HERE = Path(__file__).parent
CONFIGS = Path(trl.__file__).parent / "accelerate_configs"


def start(
    folder: Path, config: str, *machines: str, more: tuple[str, ...] = ()
) -> subprocess.Popen:
    """Launch as the guide does, but for the names of files and `cpus_for_gpus.py`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *machines, "--num_processes=2"]
    command += [f"--config_file={CONFIGS / config}.yaml", "--mixed_precision=no"]
    command += [str(HERE / "cpus_for_gpus.py"), "train", f"--model={folder / 'model'}"]
    command += [f"--dataset={folder / 'train.jsonl'}", f"--output-dir={folder / 'run'}"]
    command += ["--reward=format", "--max-steps=2", "--max-completion-length=6"]
    for setting in ("use_cpu=false", "bf16=false", "per_device_train_batch_size=2", "save_steps=1"):
        command += ["--set", setting]
    return subprocess.Popen(
        [*command, *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(launched: list[subprocess.Popen], folder: Path) -> None:
    """Two ranks were there to the end, and the run's files are those of two updates."""
    printed = [each.communicate(timeout=900)[0] for each in launched]
    assert [each.returncode for each in launched] == [0] * len(launched), "".join(printed)[-5000:]
    assert sorted(re.findall(r"rank (\d) of 2 is done", "".join(printed))) == ["0", "1"]
    rows = [json.loads(row) for row in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in rows if "igrpo/uplift" in row]) == 2
    assert (folder / "run" / "model.safetensors").stat().st_size > 10_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    problems = [json.dumps({"prompt": f"{n}+{n}?", "answer": str(2 * n)}) for n in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(problems))
    return tmp_path


@pytest.mark.parametrize("config", ["multi_gpu", "fsdp2", "zero3"])
def test_eight_gpus_as_two_processes(folder: Path, config: str) -> None:
    if config == "zero3" and find_spec("deepspeed") is None:
        pytest.skip("make test-zero3 installs DeepSpeed")
    finish([start(folder, config)], folder)


def test_the_command_resumes_on_two_ranks(folder: Path) -> None:
    """From the checkpoint before the last, as after a kill: the run that never stopped."""
    run = folder / "run"
    finish([start(folder, "fsdp2")], folder)
    whole, state = load_file(run / "model.safetensors"), run / "checkpoint-1/trainer_state.json"
    written = state.stat().st_mtime_ns
    shutil.rmtree(run / "checkpoint-2")
    (run / "model.safetensors").unlink()
    finish([start(folder, "fsdp2", more=("--resume",))], folder)
    assert state.stat().st_mtime_ns == written  # the first update was not done again
    for name, weight in load_file(run / "model.safetensors").items():
        assert torch.equal(weight, whole[name]), name


def test_several_machines_as_two_launchers(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    machines = ["--num_machines=2", "--main_process_ip=localhost", f"--main_process_port={port}"]
    launched = [
        start(
            folder, "fsdp2", *machines, f"--machine_rank={rank}", more=("--sampler=transformers",)
        )
        for rank in (0, 1)
    ]
    finish(launched, folder)
