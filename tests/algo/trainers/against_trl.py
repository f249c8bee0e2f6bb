"""A trainer's loss beside TRL's, inside the run: value, gradient and metrics."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import GRPOTrainer


def loss_and_gradients(trainer: Any, compute: Any, inputs: dict[str, Any]) -> list[Tensor]:
    loss = compute(trainer.model, inputs)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def newly_logged(trainer: Any, compute: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return what a loss returned and what it logged, which is taken back."""
    metrics = trainer._metrics["train"]
    before = {name: len(values) for name, values in metrics.items()}
    result = compute()
    found = {
        name: values.pop()
        for name, values in list(metrics.items())
        if len(values) > before.get(name, 0)
    }
    return result, found


def compare_with_trl(trainer: Any) -> list[dict[str, float]]:
    """Train with our loss; at each micro-batch demand TRL's value, gradient and metrics."""
    ours, compared, largest = trainer._compute_loss, [], []

    def theirs(*args: Any) -> Tensor:
        return GRPOTrainer._compute_loss(trainer, *args)

    def both(model: Any, inputs: dict[str, Any]) -> Tensor:
        (mine, my_metrics), (other, other_metrics) = (
            newly_logged(trainer, partial(loss_and_gradients, trainer, compute, inputs))
            for compute in (ours, theirs)
        )
        largest.append(max(float(gradient.abs().max()) for gradient in other[1:]))
        # The sums run in another order: float32 rounding of gradients of order 0.1.
        for mine_each, other_each in zip(mine, other, strict=True):
            torch.testing.assert_close(mine_each, other_each, rtol=1e-5, atol=2e-7)
        # Every advantage is far from zero here, so the means over the others are those over all.
        my_metrics = {k.removesuffix("/nonzero_advantage"): v for k, v in my_metrics.items()}
        assert my_metrics.keys() == other_metrics.keys() | {"ratio"}
        del my_metrics["ratio"]
        assert my_metrics == pytest.approx(other_metrics, rel=1e-4, abs=1e-7, nan_ok=True)
        compared.append(other_metrics)
        return ours(model, inputs)

    trainer._compute_loss = both
    trainer.train()
    assert max(largest) > 1e-4
    assert all(len(each) == len(compared[0]) or "entropy_coef" in each for each in compared)
    return compared


def off_policy(**options: Any) -> dict[str, Any]:
    """Two epochs over each generation, and two accumulation steps: ratios differ from 1."""
    return {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "generation_kwargs": {"suppress_tokens": [0, 1, 3, *range(12, 99)]},  # one in 9 is the end
        **options,
    }
