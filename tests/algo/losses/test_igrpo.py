"""igrpo_loss against equation 5 of the paper, written out as a loop."""

import math

import pytest
import torch

from igrpo_algo import igrpo_loss


def equation_5(logprobs, old, ref, advantages, lengths, low, high, beta):
    """Objective and its derivative (equation 29, with the sign of a loss), in plain floats."""
    loss, grads = 0.0, [[0.0] * len(row) for row in logprobs]
    for j, n in enumerate(lengths):
        for t in range(n):
            r = math.exp(logprobs[j][t] - old[j][t])
            rho = math.exp(ref[j][t] - logprobs[j][t])
            a = advantages[j]
            objective = min(r * a, min(max(r, 1 - low), 1 + high) * a)
            objective -= beta * (rho - math.log(rho) - 1)
            # equation 22: the indicator of an active ratio
            active = r <= 1 + high if a >= 0 else r >= 1 - low
            slope = (a * r if active else 0.0) + beta * (rho - 1)
            loss -= objective / (len(lengths) * n)
            grads[j][t] = -slope / (len(lengths) * n)
    return loss, grads


@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_equation_5(seed, beta):
    g = torch.Generator().manual_seed(seed)
    lengths = [3, 5, 1, 4]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]

    def normal():
        return torch.randn(4, 5, generator=g, dtype=torch.float64)

    logprobs = -normal().abs()
    old, ref = logprobs + 0.3 * normal(), logprobs + 0.3 * normal()
    advantages = normal()[:, 0]
    expected, expected_grad = equation_5(
        *(x.tolist() for x in (logprobs, old, ref, advantages)), lengths, 0.2, 0.28, beta
    )
    leaf = torch.where(mask, logprobs, float("nan")).requires_grad_()
    reference = {"ref_logprobs": ref, "kl_coef": beta} if beta else {}
    loss = igrpo_loss(
        leaf, advantages, mask, old_logprobs=old, clip_low=0.2, clip_high=0.28, **reference
    )
    (grad,) = torch.autograd.grad(loss, leaf)
    # float64 against Python floats: the order of additions is all that differs.
    torch.testing.assert_close(loss.item(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        grad, torch.tensor(expected_grad, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_packed_and_padded_agree_and_denominator_replaces_the_count():
    logprobs = torch.tensor([[-1.0, -0.5], [-0.2, 9.9]])
    mask = torch.tensor([[1, 1], [1, 0]])
    old = logprobs - 0.1
    advantages = torch.tensor([1.0, -2.0])
    padded = igrpo_loss(logprobs, advantages, mask, old_logprobs=old)
    packed = igrpo_loss(
        logprobs[mask.bool()],
        advantages,
        old_logprobs=old[mask.bool()],
        cu_seqlens=torch.tensor([0, 2, 3]),
    )
    # r = e^0.1 in every slot: -(r - 2 r) / 2
    expected = torch.tensor(math.exp(0.1) / 2)
    torch.testing.assert_close(padded, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(packed, expected, rtol=1e-6, atol=1e-6)
    quarter = igrpo_loss(logprobs, advantages, mask, old_logprobs=old, denominator=8)
    torch.testing.assert_close(quarter, expected / 4, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": -0.1}, r"^clip_low must be >= 0.0, got -0.1"),
        ({"kl_coef": 0.1}, r"kl_coef=0.1 needs ref_logprobs"),
        ({"ref_logprobs": torch.zeros(1, 2)}, r"ref_logprobs has no effect with kl_coef=0.0"),
        ({"denominator": -1.0}, r"denominator must be >= 0.0"),
        ({"mask": torch.ones(1, 3)}, r"mask must have shape of logprobs = \[1, 2\], got \[1, 3\]"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        igrpo_loss(torch.zeros(1, 2), torch.ones(1), **options)
