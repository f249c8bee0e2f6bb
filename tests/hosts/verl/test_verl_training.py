"""Three steps of verl's FSDP2 engine on two ranks: with our loss as with verl's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from differences import note
from tiny_qwen3 import make_model, make_tokenizer


def test_three_steps_of_the_fsdp2_engine_are_those_of_the_vanilla_loss(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "cpu_platform",
        "OMP_NUM_THREADS": "1",
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(HERE / "train_on_cpu.py"), str(tmp_path / "model"), str(tmp_path / "result")]
    done = subprocess.run(
        [sys.executable, *launch, *script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    trained = json.loads((tmp_path / "result").read_text())
    theirs, ours = trained["vanilla"], trained["igrpo"]
    assert len(ours["steps"]) == 3
    for their, our in zip(theirs["steps"], ours["steps"], strict=True):
        gap = max(abs(our[name] - their[name]) for name in our)
        note("verl", "loss and gradient norm of three FSDP2 steps, two ranks", gap)
        assert gap <= 1e-6
        assert our["grad_norm"] > 0
    # Adam divides by the gradient's size, so a difference of rounding grows; the sums are of 10^2.
    assert ours["weights"] == pytest.approx(theirs["weights"], abs=1e-4)
    losses = [step["loss"] for step in ours["steps"]]
    assert losses == sorted(losses, reverse=True)
