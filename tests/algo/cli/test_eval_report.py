"""The numbers of `igrpo eval`, by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from igrpo_algo.cli.eval_report import print_report, report


def answers(*scores: float | None, text: str = "a", cut: bool = False) -> list[dict[str, Any]]:
    reason = "length" if cut else "stop"
    return [
        {"text": text, "tokens": 2, "finish_reason": reason, "scores": {"math": score}}
        for score in scores
    ]


def test_report_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "single": answers(1.0, 1.0, 0.0, 0.0),
            "drafts": answers(0.0, 0.5),
            "chosen": 1,
            "shown": "a",
            "refinements": answers(1.0, 1.0, text="<think>Again?</think>a"),
        },
        {
            "single": answers(0.0, 0.0, 0.0, 0.5, cut=True),
            "drafts": answers(1.0, 0.0),
            "chosen": 0,
            "shown": "a",
            "refinements": answers(1.0, 0.0, text="b"),
        },
        {
            "single": answers(None, None, None, None),
            "drafts": answers(None, None),
            "chosen": -1,
            "shown": "",
            "refinements": answers(None, None, text="b"),
        },
    ]
    results = report(rows, ["math"], [1, 2, 4], 1.0)
    single = results["single"]
    # pass@1 of the prompts: 1/2 and 0. Wilson's bounds for a mean of 1/4 over two prompts:
    # (1/4 + z^2 / 4 -+ z sqrt(3/32 + z^2 / 16)) / (1 + z^2 / 2).
    assert single["pass@1"]["mean"] == pytest.approx(0.25, abs=1e-12)
    z = 1.959963984540054
    margin = z * (3 / 32 + z**2 / 16) ** 0.5
    for side, bound in ((-1, "low"), (1, "high")):
        wanted = (0.25 + z**2 / 4 + side * margin) / (1 + z**2 / 2)
        assert single["pass@1"][bound] == pytest.approx(wanted, rel=1e-9)
    # pass@2 of the first prompt: 1 - C(2, 2) / C(4, 2) = 5/6.
    assert single["pass@2"]["mean"] == pytest.approx(5 / 12, abs=1e-12)
    assert single["reward/math"] == pytest.approx(2.5 / 8, abs=1e-12)
    assert (single["answers"], single["unscored"]) == (12, 4)
    assert single["cut_short"] == pytest.approx(1 / 3, abs=1e-12)
    assert results["refinements"]["pass@1"]["mean"] == pytest.approx(0.75, abs=1e-12)
    # Right answers: drafts 0 and 1/2, refinements 1 and 1/2.
    assert results["uplift"] == pytest.approx(0.5, abs=1e-12)
    assert results["copied"] == pytest.approx(1 / 2, abs=1e-12)
    print_report(results, Path("out"))
    assert "+0.500" in capsys.readouterr().out


def test_report_of_single_answers_takes_wilson_s_interval() -> None:
    rows = [{"single": answers(1.0)} for _ in range(4)]
    interval = report(rows, ["math"], [1], 1.0)["single"]["pass@1"]
    z2 = torch.tensor(1.959964**2)
    torch.testing.assert_close(interval["low"], float(4 / (4 + z2)), rtol=1e-5, atol=0)
    assert interval["high"] == 1.0


@pytest.mark.parametrize("prompts", [2, 29, 30, 40])
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_no_interval_is_without_width(prompts: int, score: float) -> None:
    rows = [{"single": answers(score, score)} for _ in range(prompts)]
    interval = report(rows, ["math"], [1, 2], 1.0)["single"]["pass@1"]
    assert interval["mean"] == score
    assert interval["high"] - interval["low"] > 0.05


def test_many_prompts_take_student_s_interval() -> None:
    rows = [{"single": answers(float(i % 2), 0.0)} for i in range(32)]
    interval = report(rows, ["math"], [1], 1.0)["single"]["pass@1"]
    # 16 prompts with 1/2, 16 with 0: the deviation is sqrt(32 / 16 / 31).
    # t of 31 degrees of freedom is 2.039513.
    margin = 2.039513 * (32 / 16 / 31 / 32) ** 0.5
    assert interval["low"] == pytest.approx(0.25 - margin, abs=1e-6)


def test_copies_are_of_what_was_shown() -> None:
    row = {
        "single": answers(0.0),
        "drafts": answers(0.0, text="<think>Two.</think>\n\nIt is 2."),
        "chosen": 0,
        "shown": "It is 2.",
        "refinements": answers(0.0, text="<think>Fine.</think>It is 2.\n")
        + answers(0.0, text="It is 3."),
    }
    assert report([row], ["math"], [1], 1.0)["copied"] == 0.5
