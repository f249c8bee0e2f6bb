"""Losses as loops in plain Python floats, written from the papers, and batches to run them on.

An oracle takes one sequence (log-probs, old log-probs, advantages, the weight of each token) and
returns its weighted loss and the derivative by each log-prob, in closed form.
"""

import math

import torch

from igrpo_kernels import (
    Cispo,
    Clip,
    FixedLength,
    Reinforce,
    Sapo,
    SequenceClip,
    SequenceMean,
    Sum,
    TokenMean,
)
from igrpo_kernels.loss_from_logprobs import policy_loss
from igrpo_kernels.surrogates import DppoKl, DppoTv, Gmpo, SequenceTokenClip, Vespo


def clip_oracle(low, high, dual=None):
    def oracle(lp, old, adv, weight):
        value, grads = 0.0, []
        for x, y, a, w in zip(lp, old, adv, weight, strict=True):
            r = math.exp(x - y)
            candidates = [(r * a, r * a), (min(max(r, 1 - low), 1 + high) * a, None)]
            objective, slope = min(candidates, key=lambda c: c[0])
            if slope is None:
                slope = r * a if 1 - low <= r <= 1 + high else 0.0
            if dual is not None and a < 0 and dual * a > objective:
                objective, slope = dual * a, 0.0
            value -= w * objective
            grads.append(-w * slope)
        return value, grads

    return oracle


def gspo_oracle(low, high):
    def oracle(lp, old, adv, weight):
        n = len(lp)
        s = math.exp(sum(x - y for x, y in zip(lp, old, strict=True)) / n)
        value, total_slope = 0.0, 0.0
        for a, w in zip(adv, weight, strict=True):
            clipped = min(max(s, 1 - low), 1 + high)
            value -= w * min(s * a, clipped * a)
            if s * a < clipped * a or s == clipped:
                total_slope -= w * a * s
        return value, [total_slope / n] * n

    return oracle


def gspo_token_oracle(low, high):
    def oracle(lp, old, adv, weight):
        s = math.exp(sum(x - y for x, y in zip(lp, old, strict=True)) / len(lp))
        clipped = min(max(s, 1 - low), 1 + high)
        value = -sum(w * min(s * a, clipped * a) for a, w in zip(adv, weight, strict=True))
        inside = [s * a < clipped * a or s == clipped for a in adv]
        return value, [-w * a * s * k for a, w, k in zip(adv, weight, inside, strict=True)]

    return oracle


def gmpo_oracle(low, high):
    def oracle(lp, old, adv, weight):
        n, logs, moves = len(lp), [], []
        for x, y, a in zip(lp, old, adv, strict=True):
            d = x - y
            c = min(d, high) if a > 0 else max(d, -low) if a < 0 else d
            logs.append(c)
            moves.append(c == d)
        s = math.exp(sum(logs) / n)
        slope = -sum(w * a for w, a in zip(weight, adv, strict=True)) * s / n
        value = -sum(w * a * s for w, a in zip(weight, adv, strict=True))
        return value, [slope * m for m in moves]

    return oracle


def weighted_oracle(coefficient):
    """-w c(r, A, log pi, log pi_old) A log pi, with c a constant under the derivative."""

    def oracle(lp, old, adv, weight):
        value, grads = 0.0, []
        for x, y, a, w in zip(lp, old, adv, weight, strict=True):
            c = coefficient(math.exp(x - y), a, x, y)
            value -= w * c * a * x
            grads.append(-w * c * a)
        return value, grads

    return oracle


def sapo_oracle(tau_positive, tau_negative):
    def oracle(lp, old, adv, weight):
        value, grads = 0.0, []
        for x, y, a, w in zip(lp, old, adv, weight, strict=True):
            tau = tau_positive if a > 0 else tau_negative
            r = math.exp(x - y)
            gate = 1 / (1 + math.exp(-tau * (r - 1)))
            value -= w * a * gate * 4 / tau
            grads.append(-w * a * 4 * gate * (1 - gate) * r)
        return value, grads

    return oracle


def vespo_oracle(k_positive=2.0, rate_positive=3.0, k_negative=3.0, rate_negative=2.0):
    def oracle(lp, old, adv, weight):
        total = math.exp(sum(x - y for x, y in zip(lp, old, strict=True)))
        value, grads = 0.0, []
        for x, a, w in zip(lp, adv, weight, strict=True):
            k, rate = (k_positive, rate_positive) if a >= 0 else (k_negative, rate_negative)
            phi = math.exp(rate) * total**k * math.exp(-rate * total)
            value -= w * phi * a * x
            grads.append(-w * phi * a)
        return value, grads

    return oracle


def dppo_tv(low, high, cap):
    def coefficient(r, a, x, y):
        rise = math.exp(x) - math.exp(y)
        outside = rise > high if a > 0 else -rise > low
        return 0.0 if outside else min(r, cap)

    return coefficient


def dppo_kl(low, high, cap):
    def coefficient(r, a, x, y):
        p, q = math.exp(x), math.exp(y)
        kl = q * math.log(q / p) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
        outside = (kl > high and p > q) if a > 0 else (kl > low and p < q)
        return 0.0 if outside else min(r, cap)

    return coefficient


# Every surrogate stands here once, or in `test_covariance_surrogates.py` if it needs the batch
SURROGATES = {
    "clip": (Clip(0.2, 0.2), clip_oracle(0.2, 0.2)),
    "clip-higher": (Clip(0.1, 0.3), clip_oracle(0.1, 0.3)),
    "dual-clip": (Clip(0.2, 0.2, dual=1.5), clip_oracle(0.2, 0.2, dual=1.5)),
    "gspo": (SequenceClip(0.05, 0.08), gspo_oracle(0.05, 0.08)),
    "gspo-token": (SequenceTokenClip(0.05, 0.08), gspo_token_oracle(0.05, 0.08)),
    "gmpo": (Gmpo(0.2, 0.3), gmpo_oracle(0.2, 0.3)),
    "reinforce": (Reinforce(), weighted_oracle(lambda r, a, x, y: 1.0)),
    "cispo": (Cispo(1.3), weighted_oracle(lambda r, a, x, y: min(r, 1.3))),
    "cispo-relative": (
        Cispo.relative(0.2, 0.3),
        weighted_oracle(lambda r, a, x, y: min(max(r, 0.8), 1.3)),
    ),
    "sapo": (Sapo(1.0, 1.05), sapo_oracle(1.0, 1.05)),
    "sapo-other": (Sapo(0.7, 1.9), sapo_oracle(0.7, 1.9)),
    "vespo": (Vespo(), vespo_oracle()),
    "vespo-other": (Vespo(1.5, 2.5, 2.0, 1.0), vespo_oracle(1.5, 2.5, 2.0, 1.0)),
    "dppo-tv": (DppoTv(0.03, 0.05, 1.6), weighted_oracle(dppo_tv(0.03, 0.05, 1.6))),
    "dppo-kl": (DppoKl(0.004, 0.006, 1.6), weighted_oracle(dppo_kl(0.004, 0.006, 1.6))),
}

AGGREGATES = {
    "sequence-mean": (SequenceMean(), lambda lengths, i: 1 / (len(lengths) * lengths[i])),
    "token-mean": (TokenMean(), lambda lengths, i: 1 / sum(lengths)),
    "fixed-length": (FixedLength(11), lambda lengths, i: 1 / (11 * len(lengths))),
    "sum": (Sum(), lambda lengths, i: 1.0),
    "sequence-mean-of-9": (SequenceMean(9), lambda lengths, i: 1 / (9 * lengths[i])),
    "token-mean-of-40": (TokenMean(torch.tensor(40)), lambda lengths, i: 1 / 40),
    "fixed-length-of-7": (FixedLength(11, 7.0), lambda lengths, i: 1 / 77),
    "sum-of-3": (Sum(torch.tensor(3.0)), lambda lengths, i: 1 / 3),
}

LENGTHS = [5, 1, 3, 7]


def make_batch(seed=0, lengths=LENGTHS, spread=0.5, dtype=torch.float64):
    """Draw a padded batch whose padding holds junk; advantages of both signs and a zero."""
    g = torch.Generator().manual_seed(seed)
    size = (len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    logprobs = -2.0 * torch.rand(size, generator=g, dtype=dtype) - 0.05
    old = (logprobs + spread * torch.randn(size, generator=g, dtype=dtype)).clamp(max=-0.01)
    ref = logprobs + spread * torch.randn(size, generator=g, dtype=dtype)
    advantages = torch.randn(len(lengths), generator=g, dtype=dtype)
    advantages[-1] = 0.0 if seed % 3 == 2 else advantages[-1]
    junk = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
    filler = junk[torch.randint(3, size, generator=g)]
    return {
        "logprobs": torch.where(mask, logprobs, filler),
        "advantages": advantages,
        "mask": mask,
        "old_logprobs": torch.where(mask, old, filler.flip(0)),
        "ref_logprobs": torch.where(mask, ref, filler.flip(1)),
    }


def pack(batch):
    """Turn a padded batch into its packed form."""
    mask = batch["mask"]
    packed = {k: v[mask] for k, v in batch.items() if k not in ("mask", "advantages")}
    offsets = torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0))
    return packed | {"advantages": batch["advantages"], "cu_seqlens": offsets}


def run(batch, **options):
    """Compute loss, gradient and metrics."""
    logprobs = batch["logprobs"].clone().requires_grad_()
    rest = {k: v for k, v in batch.items() if k not in ("logprobs", "advantages")}
    out = policy_loss(logprobs, batch["advantages"], **rest, **options)
    (grad,) = torch.autograd.grad(out.loss, logprobs)
    return out.loss.detach(), grad, out.metrics


def without_ref(batch):
    return {k: v for k, v in batch.items() if k != "ref_logprobs"}


def oracle_of_batch(batch, oracle, weight):
    """Apply an oracle sequence by sequence."""
    total, rows = 0.0, torch.zeros_like(batch["logprobs"])
    lengths = batch["mask"].sum(-1).tolist()
    for i, n in enumerate(lengths):
        lp, old = batch["logprobs"][i, :n].tolist(), batch["old_logprobs"][i, :n].tolist()
        adv = [batch["advantages"][i].item()] * n
        value, grads = oracle(lp, old, adv, [weight(lengths, i)] * n)
        total += value
        rows[i, :n] = torch.tensor(grads, dtype=rows.dtype)
    return torch.tensor(total, dtype=rows.dtype), rows
