"""Clip-Cov and KL-Cov against loops in plain floats."""

import math

import pytest
import torch

from igrpo_kernels import Clip, Sum
from igrpo_kernels.loss_from_logprobs import policy_loss
from igrpo_kernels.surrogates import ClipCov, KlCov

LENGTHS = [6, 3, 8]
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def make_batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    size = (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    logprobs = -3.0 * torch.rand(size, generator=g, dtype=torch.float64)
    old = logprobs + 0.3 * torch.randn(size, generator=g, dtype=torch.float64)
    junk = torch.tensor(float("nan"), dtype=torch.float64)
    return (
        torch.where(mask, logprobs, junk),
        2.0 * torch.randn(len(LENGTHS), generator=g, dtype=torch.float64),
        mask,
        torch.where(mask, old, junk),
    )


def counted(mask):
    return [tuple(ij) for ij in mask.nonzero().tolist()]


def covariance_by_hand(logprobs, advantages, mask):
    cells = counted(mask)
    mean_a = sum(advantages[i].item() for i, _ in cells) / len(cells)
    mean_x = sum(logprobs[ij].item() for ij in cells) / len(cells)
    return {
        ij: (advantages[ij[0]].item() - mean_a) * (logprobs[ij].item() - mean_x) for ij in cells
    }


def token_grads(surrogate, logprobs, advantages, mask, old):
    leaf = logprobs.clone().requires_grad_()
    out = policy_loss(
        leaf, advantages, mask, surrogate=surrogate, aggregate=Sum(), old_logprobs=old
    )
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return out.loss.detach(), grad


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_kl_cov_penalises_the_tokens_of_greatest_covariance(seed, share):
    logprobs, advantages, mask, old = make_batch(seed)
    covariance = covariance_by_hand(logprobs, advantages, mask)
    quota = max(1, math.floor(share * len(covariance)))
    chosen = sorted(covariance, key=covariance.get, reverse=True)[:quota]
    value, expected = 0.0, torch.zeros_like(logprobs)
    for i, j in covariance:
        d = (logprobs[i, j] - old[i, j]).item()
        a = advantages[i].item()
        value -= math.exp(d) * a
        expected[i, j] = -math.exp(d) * a
        if (i, j) in chosen:
            value += 0.7 * abs(d)
            expected[i, j] += math.copysign(0.7, d)
    loss, grad = token_grads(KlCov(share=share, coef=0.7), logprobs, advantages, mask, old)
    torch.testing.assert_close(loss, torch.tensor(value, dtype=loss.dtype), **EXACT)
    torch.testing.assert_close(grad, expected, **EXACT)


@pytest.mark.parametrize("seed", range(6))
def test_clip_cov_holds_back_a_few_eligible_tokens(seed):
    logprobs, advantages, mask, old = make_batch(seed)
    covariance = covariance_by_hand(logprobs, advantages, mask)
    _, plain = token_grads(Clip(0.2, 0.3), logprobs, advantages, mask, old)
    eligible = {ij for ij, c in covariance.items() if 0.1 < c < 2.0 and plain[ij].item() != 0.0}
    quota = min(len(eligible), max(1, math.floor(0.2 * len(covariance))))
    surrogate = ClipCov(
        torch.Generator().manual_seed(seed),
        low=0.2,
        high=0.3,
        share=0.2,
        min_covariance=0.1,
        max_covariance=2.0,
    )
    _, grad = token_grads(surrogate, logprobs, advantages, mask, old)
    held = {ij for ij in covariance if grad[ij].item() == 0.0 and plain[ij].item() != 0.0}
    assert held <= eligible
    assert len(held) == quota
    kept = torch.tensor([[(i, j) not in held for j in range(8)] for i in range(3)])
    torch.testing.assert_close(grad[kept], plain[kept], **EXACT)


def test_clip_cov_draws_by_its_generator():
    logprobs, advantages, mask, old = make_batch(1)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        surrogate = ClipCov(generator, share=0.3, min_covariance=-9.0, max_covariance=9.0)
        return token_grads(surrogate, logprobs, advantages, mask, old)[1]

    assert torch.equal(draw(5), draw(5))
    assert any(not torch.equal(draw(5), draw(seed)) for seed in range(6, 12))


def test_nothing_eligible_leaves_the_clip():
    logprobs, advantages, mask, old = make_batch(2)
    surrogate = ClipCov(torch.Generator(), min_covariance=98.0, max_covariance=99.0)
    expected = token_grads(Clip(), logprobs, advantages, mask, old)
    actual = token_grads(surrogate, logprobs, advantages, mask, old)
    torch.testing.assert_close(actual[0], expected[0], **EXACT)
    torch.testing.assert_close(actual[1], expected[1], **EXACT)
