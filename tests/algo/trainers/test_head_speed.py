"""The choice of the faster head follows the recorded runs."""

import pytest
import torch

from benchmarks import speed_table
from benchmarks.cases import BOTH
from benchmarks.compare import rows
from igrpo_algo.trainers import head_speed
from igrpo_algo.trainers.head_speed import MEASURED, Measured, faster_head

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_table_is_what_the_newest_record_of_each_kind_gives(kind: str) -> None:
    path, record = speed_table.newest()[kind]
    shares = [
        ratio.value
        for row in rows(record)
        if (row.case.op, row.case.passes) == ("linear_token_logprobs", BOTH)
        if (ratio := row.over_fastest({"TRL"}))
    ]
    capability = record["hardware"].get("capability")
    wanted = Measured(
        capability and tuple(map(int, capability.split("."))),
        round(max(shares), 2),
        path.name,
        record["commit"],
    )
    assert wanted in MEASURED


@pytest.mark.parametrize(("share", "choice"), [(0.5, "igrpo"), (0.99, "trl"), (1.3, "trl")])
def test_a_share_within_the_noise_leaves_trl_its_own(
    share: float, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Measured(None, share, "a-run.json", "abc123")
    monkeypatch.setattr(head_speed, "MEASURED", (run,))
    found = faster_head(CPU)
    assert found.choice == choice
    assert found.reason == (
        f"ours took {share:.2f} of TRL's time (benchmarks/results/a-run.json, commit abc123)"
    )


def test_an_unknown_gpu_keeps_trl_and_a_known_one_is_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = (Measured(None, 0.1, "c", "c"), Measured((9, 0), 0.2, "h100.json", "g"))
    monkeypatch.setattr(head_speed, "MEASURED", runs)
    for capability, choice in {(8, 0): "trl", (9, 0): "igrpo"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert faster_head(torch.device("cuda")).choice == choice
    assert faster_head(torch.device("mps")) == ("trl", "nothing was measured on mps")
