"""A step of the trainer beside TRL's: the same gradient, and a record of both."""

import json

import pytest
import torch
from transformers import PreTrainedModel

from benchmarks import speed_page, trainer_step

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning:transformers",
    "ignore:.*deprecated:DeprecationWarning",
)
SMALL = {"prompts": 2, "refinements": 2, "prompt": 4, "tokens": 6}
SMALL |= {"layers": 1, "width": 64, "vocabulary": 64}


def test_both_trainers_are_timed_on_groups_of_both_kinds(tmp_path, monkeypatch):
    path = tmp_path / "step.json"
    given = [f"--{name}={size}" for name, size in SMALL.items()]
    monkeypatch.setattr("sys.argv", ["trainer_step", *given, "--rounds=1", "--output", str(path)])
    trainer_step.main()
    record = json.loads(path.read_text())
    kinds = [(figure["equal_groups"], figure["trainer"]) for figure in record["figures"]]
    assert kinds == [(0, "igrpo"), (0, "TRL"), (1, "igrpo"), (1, "TRL")]
    assert all(0 < f["loss_ms"]["median"] < f["step_ms"]["median"] for f in record["figures"])
    assert all(figure["error"] < 1e-5 for figure in record["figures"])  # float32 rounding
    lines = list(speed_page.trainer_step(record))
    assert [line[:2] for line in lines[1:]] == [[str(equal), name] for equal, name in kinds]
    assert lines[1][3] == ""
    assert float(lines[2][3]) > 0


def test_another_gradient_is_not_timed(tmp_path, monkeypatch):
    case = trainer_step.Case(**SMALL)

    class Other(trainer_step.IGRPOTrainer):
        def _compute_loss(self, model: PreTrainedModel, inputs: dict) -> torch.Tensor:
            return 1.1 * super()._compute_loss(model, inputs)

    monkeypatch.setitem(trainer_step.TRAINERS, "igrpo", Other)
    with pytest.raises(ArithmeticError, match=r"the heads' gradients differ by 0\.1"):
        trainer_step.compare(case, 1, str(tmp_path))
