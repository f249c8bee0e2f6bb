"""Which loss the trainer takes, and what it is divided by."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scripted import ScriptedSampler
from tiny_qwen import digit_reward, third_party

from igrpo_kernels import Clip, FixedLength, Reinforce, Sum, TokenMean

pytestmark = third_party
MakeTrainer = Callable[..., Any]


def test_trl_loss_on_request(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(use_trl_loss=True, loss_type="dapo", max_steps=1)
    trainer.train()
    assert "ratio" not in trainer.state.log_history[0]  # a metric of our loss alone


def test_a_surrogate_and_an_aggregate_take_the_place_of_the_loss_type(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(
        surrogate=Reinforce(), aggregate=Sum(denominator=7.0), reward_funcs=digit_reward
    )
    trainer._generate_single_turn = ScriptedSampler([["0"] * 8, ["1", "22", "0", "5"] * 2])
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 8)
    trainer.current_gradient_accumulation_steps = 3
    loss = trainer._compute_loss(trainer.model, batch)
    mask = batch["completion_mask"]
    with torch.no_grad():
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], mask], 1),
            mask.shape[1],
        )
    expected = sum(
        -float(batch["advantages"][b]) * float(logprobs[b, t]) / 7
        for b in range(8)
        for t in range(mask.shape[1])
        if mask[b, t]
    )
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_given_values_keep_their_own_denominator(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(surrogate=Clip(0.1, 0.3), aggregate=FixedLength(10, denominator=3))
    assert trainer.surrogate == Clip(0.1, 0.3)
    trainer.model.eval()
    weights = trainer._weights_of(torch.ones(8, 2), 8, torch.tensor(40))
    assert float(weights) == pytest.approx(1 / (10 * 3))


def test_token_mean_counts_one_accumulation_window_trl_5890(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        surrogate=Clip(),
        aggregate=TokenMean(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=8,
    )
    mask, generated = torch.ones(4, 5), torch.tensor(40)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    assert float(trainer._weights_of(mask, 4, generated)) == pytest.approx(8 / (40 * 2))
    trainer.model.eval()
    assert float(trainer._weights_of(mask, 4, generated)) == pytest.approx(1 / 40)
