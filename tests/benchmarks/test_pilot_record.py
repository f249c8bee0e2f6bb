"""The table of the pilot in docs/method/which_draft.md says what its record says."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks/results/2026-11-26-smollm2-pilot.json"
PAGE = ROOT / "docs/method/which_draft.md"
ROWS = {
    "GRPO, 8": "grpo8",
    "iGRPO 4 + 4, best draft (the paper's form)": "igrpo-best",
    "best draft, dropped half of the time": "igrpo-drop",
    "worst draft": "igrpo-worst",
    "both stages trained, worst draft": "igrpo-both-worst",
}


@pytest.mark.parametrize("label", ROWS)
def test_the_pages_numbers_are_the_records(label: str) -> None:
    runs = [
        run
        for run in json.loads(RECORD.read_text())["runs"]
        if run["arm"] == ROWS[label] and run["lr"] == 1e-5 and run["steps"] == 40
    ]
    assert len(runs) == 2
    last = [run["evaluations"][-1] for run in runs]
    means = [100 * fmean(row[name] for row in last) for name in ("sampled", "pass@8", "refined")]
    late = [run["late"] for run in runs]
    means += [100 * fmean(row["zero_variance"] for row in late)]
    means += [100 * fmean(row["copied"] for row in late)] if "copied" in late[0] else []
    lines = PAGE.read_text().replace("*", "").splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {label} |")]
    shown = re.findall(r"\d+\.\d|\d+(?= %)", line.split("|", 2)[2])
    assert len(shown) == len(means)
    for text, mean in zip(shown, means, strict=True):
        assert abs(float(text) - mean) <= (0.06 if "." in text else 0.51)  # rounded as printed
