"""The three forms of a step with a shared prompt: one gradient, and what a row of figures says."""

from dataclasses import replace

import pytest
import torch

from benchmarks import shared_prompt, shared_prompt_forms
from benchmarks.shared_prompt import bars, error, measure
from benchmarks.shared_prompt_forms import Case

TINY = Case(
    *(2, 3, 1.0, 8, 0.25),  # prompts, refinements, draft, tokens, spread
    width=64,
    layers=1,
    vocabulary=64,
    threads=torch.get_num_threads(),
)


@pytest.mark.parametrize("prompts", [1, 2])
def test_every_form_gives_one_gradient(prompts: int) -> None:
    assert error(replace(TINY, prompts=prompts)) < 1e-5  # fp32 sums in another order


def test_another_gradient_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = shared_prompt_forms.packed
    monkeypatch.setitem(shared_prompt.FORMS, "packed", lambda problem: 1.01 * packed(problem))
    assert error(TINY) == pytest.approx(0.01, rel=1e-2)


def test_a_row_of_figures_and_its_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"shared": [1.0] * 3, "padded": [2.0] * 3, "packed": [0.5] * 3}
    peaks = {"shared": 10, "padded": 40, "packed": 20}
    monkeypatch.setattr(shared_prompt, "times", lambda case, rounds: seconds)
    monkeypatch.setattr(shared_prompt, "peak_bytes", lambda form, case: peaks[form])
    row = measure(TINY, 3)
    found = [(bar.group, bar.label, bar.time, bar.memory) for bar in bars({"rows": [row]})]
    label = "P=2, G=3, draft 1 of T=8"
    assert found == [("over padded", label, 0.5, 0.25), ("over packed", label, 2.0, 0.5)]
