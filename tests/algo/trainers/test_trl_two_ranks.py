"""Two processes: groups that straddle them, weights that they share, runs that are resumed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from one_run import RUNS
from safetensors.torch import load_file
from tiny_qwen import early_letters, third_party

pytestmark = [third_party, pytest.mark.slow]


HERE = Path(__file__).parent


def launch(worker: str, *arguments: str, ends: bool = True) -> str:
    """Run a file of this folder on two ranks, each with one thread; give what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command += [str(HERE / worker), *arguments]
    return run(command, ends=ends)


def run(command: list[str], *, ends: bool = True) -> str:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert (done.returncode == 0) is ends, done.stderr[-3000:]
    return done.stdout


def run_two(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    launch("two_ranks.py", str(folder), *arguments)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["world"] for rank in ranks] == [2, 2]
    assert ranks[0]["parameters"] == ranks[1]["parameters"]
    assert ranks[0]["parameters"] != ranks[0]["before"]
    return ranks


@pytest.mark.parametrize(("draft_loss_coef", "rounds"), [(0.0, 1), (1.0, 2)])
def test_groups_that_straddle_two_ranks(
    tmp_path: Path, draft_loss_coef: float, rounds: int
) -> None:
    """4 completions of a prompt in each stage, 2 on each rank: one draft for all, one model."""
    ranks = run_two(tmp_path, str(draft_loss_coef), str(rounds), "by-trl")
    calls = [*zip(ranks[0]["calls"], ranks[1]["calls"], strict=True)]
    assert len(calls) == 3 * (1 + rounds)
    for number, (first, second) in enumerate(calls):
        assert first["drawn"] != second["drawn"]  # each rank draws its own
        (prompt,) = {*first["prompts"], *second["prompts"]}
        if number % (1 + rounds) == 0:
            pool: list[str] = []
        else:
            rewards = early_letters(pool)
            assert f"[{pool[rewards.index(max(rewards))]}]" in prompt
        pool += first["drawn"] + second["drawn"]
    assert ranks[0]["rows"] == ([6, 6] if draft_loss_coef else [2, 2])


def test_a_sampler_draws_for_both_ranks(tmp_path: Path) -> None:
    """The rank with a prompt's first row draws it for both; each rank's engine is synced."""
    ranks = run_two(tmp_path, "0.0", "1", "sampled")
    for first, second in zip(ranks[0]["calls"], ranks[1]["calls"], strict=True):
        assert len(set(first["prompts"] + second["prompts"])) == 1
        assert first["drawn"] != second["drawn"]  # each rank trains on its own rows
    assert ranks[0]["engine"] == ranks[1]["engine"]
    # The same weights in float32, once padded in a batch and once token by token.
    assert len(ranks[0]["difference"]) == 3
    assert max(ranks[0]["difference"]) < 1e-4


def test_the_loss_in_a_wrapped_forward_is_that_of_the_whole_batch() -> None:
    wrappers = ("ddp", "fsdp2", "fsdp2-apart")
    printed = launch("sharded_head.py", *wrappers)
    for wrapper in wrappers:
        assert all(f"rank {rank} agrees in {wrapper};" in printed for rank in (0, 1))


LAYOUTS = {
    # how weights are kept: ranks, and micro-batches on all of them together
    "plain": (1, 1),
    "accumulated": (1, 8),
    "ddp": (2, 8),
    "fsdp2": (2, 8),
    "zero3": (2, 8),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every run of `one_run.py` in every layout; ZeRO-3 where DeepSpeed is installed."""
    folders = {}
    for layout, (ranks, micro_batches) in LAYOUTS.items():
        if layout == "zero3" and find_spec("deepspeed") is None:
            continue
        folders[layout] = tmp_path_factory.mktemp(layout)
        how = layout if layout in ("fsdp2", "zero3") else "plain"
        arguments = (str(folders[layout]), how, str(micro_batches))
        if ranks == 1:
            run([sys.executable, str(HERE / "one_run.py"), *arguments])
        else:
            launch("one_run.py", *arguments)
    return folders


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_however_it_is_dealt_out(runs: dict[str, Path], name: str) -> None:
    """8 refinements at once on one process; one by one on it; on two ranks, a shard on each."""
    found = {
        layout: (
            load_file(folder / name / "weights.safetensors"),
            json.loads((folder / name / "logs.json").read_text()),
        )
        for layout, folder in runs.items()
    }
    weights, logs = found.pop("plain")
    assert float((weights["synced"][0] - weights["synced"][-1]).abs().max()) > 1e-4
    assert found.keys() >= {"accumulated", "ddp", "fsdp2"}
    for other_weights, other_logs in found.values():
        assert other_weights.keys() == weights.keys()
        for key, value in weights.items():
            # Three steps of plain gradient descent; sums in another order: float32 rounding.
            torch.testing.assert_close(other_weights[key], value, rtol=1e-4, atol=1e-6, msg=key)
        for mine, other in zip(other_logs, logs, strict=True):
            for metric in ("reward", "grad_norm", "igrpo/uplift", "completions/mean_length"):
                assert mine[metric] == pytest.approx(other[metric], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("how", ["plain", "fsdp2", "zero3"])
def test_a_run_that_is_killed_on_two_ranks_goes_on_as_if_it_had_not_been(
    tmp_path: Path, how: str
) -> None:
    if how == "zero3" and find_spec("deepspeed") is None:
        pytest.skip("make test-zero3 installs DeepSpeed")
    launch("resumed_run.py", str(tmp_path), how, "killed", ends=False)
    left = {path.name for path in (tmp_path / "killed" / "checkpoint-3").iterdir()}
    assert left >= {f"generated_batch_{rank}.safetensors" for rank in (0, 1)}
    assert not (tmp_path / "killed.safetensors").exists()
    launch("resumed_run.py", str(tmp_path), how, "resumed", "whole")
    whole, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)
