"""Completions of zero advantage: what is left out, and where nothing is."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from against_trl import loss_and_gradients
from scripted import ScriptedSampler
from tiny_qwen import digit_reward, third_party

pytestmark = third_party
MakeTrainer = Callable[..., Any]


def rows_run(trainer: Any) -> list[int]:
    """Count the rows that each forward of the loss runs."""
    counts, forward = [], trainer.model.forward

    def counted(*args: Any, **options: Any) -> Any:
        if "head" in options and torch.is_grad_enabled():
            counts.append(len(options["input_ids"]))
        return forward(*args, **options)

    trainer.model.forward = counted
    return counts


# Rewards of two groups: the first of equal ones, whose advantages are zero.
EQUAL_AND_UNEQUAL = ["1", "1", "1", "1", "0", "2", "3", "4"]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_completions_of_zero_advantage_are_not_computed(
    make_trainer: MakeTrainer, loss_type: str
) -> None:
    found = {}
    for skip in (False, True):
        trainer = make_trainer(
            reward_funcs=digit_reward, loss_type=loss_type, skip_zero_advantages=skip
        )
        trainer._generate_single_turn = ScriptedSampler([["0"] * 8, EQUAL_AND_UNEQUAL])
        trainer.model.train()
        rows = [trainer.train_dataset[q] for q in (0, 1) for _ in range(4)]
        batch = trainer._generate_and_score_completions(rows)
        trainer.current_gradient_accumulation_steps = 1
        counts = rows_run(trainer)
        found[skip] = loss_and_gradients(trainer, trainer._compute_loss, batch)
        assert counts == [4 if skip else 8]
        logged = trainer._metrics["train"]
        assert logged["clip_ratio/low_mean"] == [0.0]
        assert ("entropy" in logged, "entropy/nonzero_advantage" in logged) == (not skip, skip)
    assert max(float(gradient.abs().max()) for gradient in found[False][1:]) > 1e-3
    for mine, other in zip(found[True], found[False], strict=True):
        # Other batch sizes: float32 rounding of gradients of order 0.1.
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-7)


def test_where_nothing_teaches_one_row_is_run_for_a_gradient_of_zero(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(reward_funcs=digit_reward)
    trainer._generate_single_turn = ScriptedSampler([["0"] * 8, ["1"] * 8])
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 8)
    trainer.current_gradient_accumulation_steps = 1
    counts = rows_run(trainer)
    loss, *gradients = loss_and_gradients(trainer, trainer._compute_loss, batch)
    assert counts == [1]
    assert math.isnan(trainer._metrics["train"]["entropy/nonzero_advantage"][0])  # not logged
    assert float(loss) == 0.0
    assert not any(gradient.any() for gradient in gradients)


def test_entropy_is_that_of_all_completions_or_says_of_which(make_trainer: MakeTrainer) -> None:
    """By hand, over the logits: of all 8 completions, and of the 4 whose advantages teach."""
    found = {}
    for skip in (False, True):
        trainer = make_trainer(reward_funcs=digit_reward, skip_zero_advantages=skip)
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(30)  # far enough from uniform
        trainer._generate_single_turn = ScriptedSampler([["0"] * 8, EQUAL_AND_UNEQUAL])
        trainer.model.train()
        rows = [trainer.train_dataset[q] for q in (0, 1) for _ in range(4)]
        batch = trainer._generate_and_score_completions(rows)
        trainer.current_gradient_accumulation_steps = 1
        trainer._compute_loss(trainer.model, batch)
        name = "entropy/nonzero_advantage" if skip else "entropy"
        (found[skip],) = trainer._metrics["train"][name]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = trainer.model(ids, attention_mask=mask).logits[:, -2]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert found[False] == pytest.approx(float(entropy.mean()), rel=1e-5)
    assert found[True] == pytest.approx(float(entropy[4:].mean()), rel=1e-5)
    assert abs(found[True] / found[False] - 1) > 1e-4


@pytest.mark.parametrize("beyond", [{"beta": 0.1}, {"entropy_coef": 0.1}])
def test_what_needs_all_completions_gets_them(
    make_trainer: MakeTrainer, saved_model: str, beyond: dict[str, float]
) -> None:
    trainer = make_trainer(
        model=saved_model, reward_funcs=lambda completions, **_: [1.0] * len(completions), **beyond
    )
    counts = rows_run(trainer)
    trainer.train()
    assert counts == [8, 8]
