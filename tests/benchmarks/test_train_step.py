"""The training step of a whole model: every form trains alike, and the longest fit is found."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import train_step
from benchmarks.train_step import FORMS, SMALL, Problem, errors, longest


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_every_form_gives_the_gradient_of_all_logits(dtype, bound):
    found = errors(replace(SMALL, dtype=dtype, active=0.3))
    assert list(found) == list(FORMS)
    assert all(error <= bound for error in found.values())


def test_a_form_that_gives_another_gradient_or_none_is_left_out(monkeypatch):
    monkeypatch.setitem(FORMS, "TRL", lambda batch: 1.2 * FORMS["torch"](batch))
    monkeypatch.setitem(FORMS, "Liger", lambda batch: 1 / 0)
    found = errors(SMALL)
    assert found["TRL"] == "wrong gradient: 0.2"
    assert found["Liger"] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("form", FORMS)
def test_a_step_moves_the_weights_and_clears_the_gradients(form):
    problem = Problem(SMALL)
    before = [weight.clone() for weight in problem.model.parameters()]
    problem.step(form)
    after = list(problem.model.parameters())
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(weight.grad is None for weight in after)


@pytest.mark.parametrize(
    ("limit", "found"), [(0, 0), (511, 0), (512, 512), (5000, 4608), (8192, 8192)]
)
def test_the_longest_completion_that_fits(limit, found, monkeypatch):
    monkeypatch.setattr(train_step, "fits", lambda case, form, tokens: tokens <= limit)
    assert longest(SMALL, "igrpo") == found


def test_the_command_writes_every_form(tmp_path, monkeypatch, capsys):
    path = tmp_path / "step.json"
    monkeypatch.setattr(
        "sys.argv", ["train_step", "--small", "--rounds", "2", "--output", str(path)]
    )
    train_step.main()
    record = json.loads(path.read_text())
    assert list(record["figures"]) == list(FORMS)
    for figure in record["figures"].values():
        assert figure["ms"]["median"] > 0
        assert figure["peak_bytes"] is None
    assert "written:" in capsys.readouterr().out


def test_the_longest_is_not_sought_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_step", "--small", "--longest"])
    with pytest.raises(SystemExit):
        train_step.main()
    assert "--longest needs --device cuda" in capsys.readouterr().err


def test_layers_are_checkpointed_under_either_name(monkeypatch):
    called = []

    class Old:
        def gradient_checkpointing_enable(self):
            called.append("old")

        def train(self):
            return self

    class New(Old):
        def activation_checkpointing_enable(self):
            called.append("new")

    for model in (Old, New):
        monkeypatch.setattr(train_step, "random_qwen3", lambda model=model, **sizes: model())
        train_step.make_model(SMALL)
    assert called == ["old", "new"]
