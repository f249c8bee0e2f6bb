"""Time of the loss of 256 x 4,096 log-probs, forward and backward, beside TRL's and verl's lines.

    pytest benchmarks/bench_policy_loss.py --benchmark-enable

All start from log-probs that require a gradient and end with that gradient. Before the clock runs,
each peer must agree with ours.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from igrpo_algo import igrpo_loss, policy_loss
from igrpo_kernels import Clip, TokenMean

SEQUENCES, TOKENS = 256, 4096


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(SEQUENCES, TOKENS, generator=generator)
    old = logprobs + 0.1 * torch.randn(SEQUENCES, TOKENS, generator=generator)
    advantages = torch.randn(SEQUENCES, generator=generator)
    lengths = torch.randint(1, TOKENS + 1, (SEQUENCES, 1), generator=generator)
    mask = (torch.arange(TOKENS) < lengths).float()
    return logprobs.requires_grad_(), old, advantages, mask


INPUTS = make_inputs()


def ours(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return igrpo_loss(logprobs, advantages, mask, old_logprobs=old)


def ours_dual(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    surrogate = Clip(0.2, 0.2, dual=3.0)
    aggregate = TokenMean()
    return policy_loss(
        logprobs, advantages, mask, surrogate=surrogate, aggregate=aggregate, old_logprobs=old
    ).loss


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1.0)


def trl(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The steps of TRL 1.16.0's `_compute_loss` for `loss_type="grpo"`, its clip metrics too."""
    column = advantages.unsqueeze(1)
    ratio = torch.exp(logprobs - old)
    clipped = torch.clamp(ratio, 0.8, 1.2)
    losses = -torch.min(ratio * column, clipped * column)
    loss = ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    low, high = (ratio < 0.8) & (column < 0), (ratio > 1.2) & (column > 0)
    for clip in (low, high, low | high):
        masked_mean(clip.float(), mask)
    return loss


def verl(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The steps of verl 0.9.0's "vanilla" loss with token-mean, its metrics too."""
    advantages = advantages[:, None].expand_as(logprobs)
    log_ratio = torch.clamp(logprobs - old, min=-20.0, max=20.0)
    ratio = torch.exp(log_ratio)
    masked_mean(-log_ratio, mask)
    plain, clipped = -advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2)
    worse = torch.maximum(plain, clipped)
    masked_mean(torch.gt(clipped, plain).float(), mask)
    bounded = torch.min(-advantages * 3.0, worse)
    masked_mean(torch.gt(worse, -advantages * 3.0) * (advantages < 0).float(), mask)
    return masked_mean(torch.where(advantages < 0, bounded, worse), mask)


def step(loss: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    value = loss(*INPUTS)
    return value, torch.autograd.grad(value, INPUTS[0])[0]


CASES = {
    "igrpo, sequence mean": (ours, trl),
    "TRL, sequence mean": (trl, ours),
    "igrpo, dual clip, token mean": (ours_dual, verl),
    "verl, dual clip, token mean": (verl, ours_dual),
}


@pytest.mark.parametrize(("loss", "peer"), CASES.values(), ids=CASES)
def test_policy_loss(
    benchmark: BenchmarkFixture, loss: Callable[..., Tensor], peer: Callable[..., Tensor]
) -> None:
    # A sum of a million float32 terms in another order.
    for mine, other in zip(step(loss), step(peer), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)
    benchmark.pedantic(step, [loss], rounds=20, warmup_rounds=3)
