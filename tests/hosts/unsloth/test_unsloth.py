"""iGRPO under Unsloth: on its CPU backend, and under the trainer that it makes out of TRL's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from contract import Group

N = G = 4


def train(folder: Path, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "train_on_cpu.py"), str(folder)],
        cwd=folder,  # Unsloth writes its trainers into the folder where it runs
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize(
    ("environment", "trainer"),
    [({}, "GRPOTrainer"), ({"UNSLOTH_ALLOW_CPU": "1"}, "UnslothGRPOTrainer")],
)
def test_each_group_is_trained_under_its_best_draft(
    tmp_path: Path, environment: dict[str, str], trainer: str
) -> None:
    seen = train(tmp_path, **environment)
    assert seen["trainer"] == trainer
    assert seen["moved"]
    assert {"igrpo/draft_reward", "igrpo/uplift", "igrpo/refinement_zero_std"} <= {*seen["logged"]}
    assert len(seen["scored"]) == len(seen["sampled"]) == 4
    for step in range(2):
        drafts, refinements = seen["scored"][2 * step : 2 * step + 2]
        plain, spliced = seen["sampled"][2 * step : 2 * step + 2]
        (question,) = set(plain)
        assert drafts["answer"] == refinements["answer"]
        Group(
            question,
            drafts["texts"],
            drafts["texts"][drafts["rewards"].index(max(drafts["rewards"]))],
            [f"<s>user:{text}</s><s>assistant:" for text in spliced],
            seen["trained"][step],
            refinements["rewards"],
            seen["advantages"][step],
        ).check(num_drafts=N, num_refinements=G)
