"""What is said of the head's speed is what the newest records say."""

import pytest
import torch

from benchmarks import speed_table
from benchmarks.cases import BOTH, FORWARD
from benchmarks.compare import rows
from igrpo_algo.trainers import head_speed as module
from igrpo_algo.trainers.head_speed import MEASURED, Measured, head_speed


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_table_is_what_the_newest_record_of_each_kind_gives(kind: str) -> None:
    path, record = speed_table.newest()[kind]

    def least_and_most(op: str, passes: str) -> tuple[float, float]:
        ratios = [
            ratio.value
            for row in rows(record)
            if (row.case.op, row.case.passes) == (op, passes)
            if (ratio := row.over_fastest({"TRL"}))
        ]
        return round(min(ratios), 2), round(max(ratios), 2)

    capability = record["hardware"].get("capability")
    wanted = Measured(
        capability and tuple(map(int, capability.split("."))),
        least_and_most("linear_policy_loss", BOTH),
        least_and_most("linear_token_logprobs", FORWARD),
        path.name,
        record["commit"],
    )
    assert wanted in MEASURED


def test_a_device_is_looked_up_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = (
        Measured(None, (0.1, 0.2), (0.3, 0.4), "cpu.json", "abc"),
        Measured((9, 0), (0.5, 0.6), (0.7, 0.8), "h100.json", "def"),
    )
    monkeypatch.setattr(module, "MEASURED", runs)
    assert head_speed(torch.device("cpu")) == (
        "the loss took 0.10 to 0.20 of TRL's time, log-probs alone 0.30 to 0.40 "
        "(benchmarks/results/cpu.json, commit abc)"
    )
    for capability, said in {
        (9, 0): "0.50 to 0.60",
        (8, 0): "not yet measured on capability (8,",
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert said in head_speed(torch.device("cuda"))
