"""iGRPO under Unsloth on a CPU: with TRL's trainer as it is, and as Unsloth rewrites it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from igrpo_algo import DraftRules
from igrpo_algo.drafts.rules import Fallback
from igrpo_algo.trainers.unsloth import make_trainer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from contract import Group

N = G = 4


def train(folder: Path, *kind: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "train_on_cpu.py"), str(folder), *kind],
        cwd=folder,  # Unsloth writes its trainers there
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-4000:]
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize(
    ("kind", "trainer"), [([], "GRPOTrainer"), (["rewritten"], "UnslothGRPOTrainer")]
)
def test_each_group_is_trained_under_its_best_draft(
    tmp_path: Path, kind: list[str], trainer: str
) -> None:
    seen = train(tmp_path, *kind)
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rules": DraftRules(failed_below=1.0, when_failed=Fallback.SKIP)}, "when_failed must"),
        ({"rules": DraftRules(selection_score=len)}, "selection_score must be None"),
        ({"num_drafts": 0}, "num_drafts must be >= 1"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be >= 1"),
    ],
)
def test_bad_arguments_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(**given)


@pytest.mark.parametrize("name", ["tools", "environment_factory", "rollout_func"])
def test_options_that_contradict_drafts_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be off"):
        make_trainer()(**{name: [len]})
