"""Importance weights and masks against loops in plain floats (TRL's are in test_trl_loss)."""

import math

import pytest
import torch

from igrpo_algo.losses.corrections import (
    entropy_threshold,
    geometric_importance_weights,
    high_entropy_mask,
    mask_weights,
    off_policy_sequence_mask,
    sequence_importance_weights,
    token_importance_weights,
    truncate_weights,
)
from igrpo_algo.losses.overlong import mask_truncated_completions, overlong_penalty

EXACT = {"rtol": 1e-12, "atol": 1e-12}
LENGTHS = [3, 1, 4, 0]
MASK = torch.arange(4) < torch.tensor(LENGTHS)[:, None]


def make_pair(seed):
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(4, 4, generator=g, dtype=torch.float64)
    sampler = torch.randn(4, 4, generator=g, dtype=torch.float64)
    junk = torch.tensor(float("inf"), dtype=torch.float64)
    return torch.where(MASK, old, junk), torch.where(MASK, sampler, -junk)


@pytest.mark.parametrize("seed", range(3))
def test_weights_per_token_and_per_sequence(seed):
    old, sampler = make_pair(seed)
    sampler[0, 1] = float("nan")
    log = [
        [0.0 if math.isnan(sampler[i, t]) else (old[i, t] - sampler[i, t]).item() for t in range(n)]
        for i, n in enumerate(LENGTHS)
    ]
    tokens = [[math.exp(x) for x in row] + [1.0] * (4 - len(row)) for row in log]
    sums = [math.exp(sum(row)) for row in log]
    means = [math.exp(sum(row) / max(len(row), 1)) for row in log]
    for function, expected in [
        (token_importance_weights, tokens),
        (sequence_importance_weights, sums),
        (geometric_importance_weights, means),
    ]:
        expected = torch.tensor(expected, dtype=torch.float64)
        padded = function(old, sampler, MASK)
        torch.testing.assert_close(padded, expected, **EXACT)
        packed = function(old[MASK], sampler[MASK], cu_seqlens=torch.tensor([0, 3, 4, 8, 8]))
        flat = expected[MASK] if function is token_importance_weights else expected
        torch.testing.assert_close(packed, flat, **EXACT)
        assert not padded.requires_grad


def test_bounds_are_inside():
    weights = torch.tensor([0.4, 0.5, 1.0, 2.0, 2.5])
    assert truncate_weights(weights, low=0.5, high=2.0).tolist() == [0.5, 0.5, 1.0, 2.0, 2.0]
    assert mask_weights(weights, low=0.5, high=2.0).tolist() == [0.0, 0.5, 1.0, 2.0, 0.0]


def test_off_policy_sequences_are_dropped_only_where_punished():
    logprobs = torch.full((4, 2), -2.0)
    sampler = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [-1.6, -1.4], [-2.0, float("nan")]])
    advantages = torch.tensor([1.0, -1.0, -1.0, -1.0])
    keep = off_policy_sequence_mask(logprobs, sampler, advantages, threshold=0.5)
    assert keep.tolist() == [1.0, 0.0, 1.0, 1.0]
    zero = off_policy_sequence_mask(logprobs, sampler, torch.zeros(4), threshold=0.5)
    assert zero.tolist() == [1.0, 1.0, 1.0, 1.0]


def test_high_entropy_tokens_by_hand():
    entropy = torch.tensor([[0.0, 1.0, 2.0, float("nan")], [3.0, 4.0, 99.0, 99.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    threshold = entropy_threshold(entropy, mask, share=0.5)
    assert threshold.item() == 2.0
    kept = high_entropy_mask(entropy, threshold) * mask
    assert kept.tolist() == [[0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    assert entropy_threshold(entropy, mask, share=1.0).item() == 0.0
    assert entropy_threshold(entropy, torch.zeros(2, 4), share=0.5).isnan()
    assert entropy_threshold(torch.zeros(0, 4), share=0.5).isnan()


@pytest.mark.parametrize("share", [0.01, 0.2, 0.37, 1.0])
def test_entropy_threshold_is_the_linear_quantile(share):
    entropy = torch.rand(13, 7, dtype=torch.float64)
    mask = torch.rand(13, 7) < 0.8
    expected = torch.quantile(entropy[mask], 1 - share)
    junk = torch.where(mask, entropy, float("nan"))
    torch.testing.assert_close(
        entropy_threshold(junk, mask, share=share), expected, rtol=1e-12, atol=1e-12
    )


def test_entropy_threshold_of_more_than_two_to_the_24_tokens():
    """torch.quantile refuses these."""
    entropy = torch.linspace(0, 1, 2**24 + 2).view(2, -1)
    assert entropy_threshold(entropy, share=0.25).item() == pytest.approx(0.75, abs=1e-6)


def test_bounds_are_not_rounded_to_bfloat16():
    """1.0078125 is the number after 1 in bfloat16; 1.003 would round to 1."""
    values = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)
    for kept in (
        high_entropy_mask(values, 1.003),
        high_entropy_mask(values, torch.tensor(1.003)),
        mask_weights(values, low=1.003, high=2.0) / 1.0078125,
    ):
        assert kept.dtype == torch.float32
        assert kept.tolist() == [0.0, 1.0]
    assert truncate_weights(values, high=1.003).tolist() == [1.0, pytest.approx(1.003, rel=1e-6)]


def test_no_gradient_leaves_through_bounds():
    weights = torch.ones(2, requires_grad=True)
    assert not truncate_weights(weights, high=2.0).requires_grad
    assert not mask_weights(weights, high=2.0).requires_grad


def test_overlong_penalty_is_equation_13_of_dapo():
    lengths = torch.arange(0, 130, 7)
    for max_length, buffer in [(100, 20), (100, 0), (100, 100)]:
        expected = []
        for n in lengths.tolist():
            if n <= max_length - buffer:
                expected.append(0.0)
            elif n <= max_length:
                expected.append((max_length - buffer - n) / buffer)
            else:
                expected.append(-1.0)
        actual = overlong_penalty(lengths, max_length=max_length, buffer=buffer)
        # float32 quotients of small integers
        torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64])
def test_lengths_may_be_small_integers(dtype):
    lengths = torch.tensor([80, 90, 101], dtype=dtype)
    penalty = overlong_penalty(lengths, max_length=100, buffer=20)
    assert penalty.tolist() == [0.0, -0.5, -1.0]
    assert overlong_penalty(lengths, max_length=1000, buffer=500).tolist() == [0.0] * 3


def test_truncated_completions_stop_counting():
    mask = torch.tensor([[True, True], [True, False]])
    assert mask_truncated_completions(mask, torch.tensor([False, True])).tolist() == [
        [True, True],
        [False, False],
    ]
    packed = mask_truncated_completions(
        torch.ones(3), torch.tensor([True, False]), cu_seqlens=torch.tensor([0, 2, 3])
    )
    assert packed.tolist() == [0.0, 0.0, 1.0]


PAIR = (torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: token_importance_weights(torch.zeros(2, 3), torch.zeros(2, 2)),
            ValueError,
            r"sampler_logprobs must have shape .* \[2, 3\], got \[2, 2\]",
        ),
        (
            lambda: token_importance_weights(torch.zeros(2, 3).long(), torch.zeros(2, 3)),
            TypeError,
            r"old_logprobs must be a floating-point tensor",
        ),
        (
            lambda: sequence_importance_weights(*PAIR, torch.ones(3)),
            ValueError,
            r"mask must have shape",
        ),
        (lambda: truncate_weights(torch.ones(1), high=-1.0), ValueError, r"high must be >= 0.0"),
        (lambda: mask_weights(torch.ones(1), low=2.0, high=1.0), ValueError, r"high must be >= 2"),
        (lambda: mask_weights(torch.ones(1).int(), high=1.0), TypeError, r"weights must be"),
        (
            lambda: off_policy_sequence_mask(*PAIR, torch.ones(3), threshold=0.5),
            ValueError,
            r"advantages must have shape \[B\] = \[2\], got \[3\]",
        ),
        (
            lambda: off_policy_sequence_mask(*PAIR, torch.ones(2), threshold=float("nan")),
            ValueError,
            r"threshold must be finite",
        ),
        (
            lambda: entropy_threshold(torch.zeros(2, 3), share=0.0),
            ValueError,
            r"share must be > 0.0, got 0.0",
        ),
        (
            lambda: high_entropy_mask(torch.zeros(2).long(), 0.5),
            TypeError,
            r"entropy must be a floating-point tensor",
        ),
        (
            lambda: overlong_penalty(torch.ones(2), max_length=5, buffer=1),
            TypeError,
            r"lengths must be an integer tensor",
        ),
        (
            lambda: overlong_penalty(torch.ones(2).long(), max_length=5, buffer=6),
            ValueError,
            r"buffer must be <= max_length = 5, got 6",
        ),
        (
            lambda: overlong_penalty(torch.ones(2).long(), max_length=0, buffer=0),
            ValueError,
            r"max_length must be >= 1, got 0",
        ),
        (
            lambda: mask_truncated_completions(torch.ones(2, 3), torch.ones(3)),
            ValueError,
            r"truncated must have shape \[B\] = \[2\], got \[3\]",
        ),
        (
            lambda: mask_truncated_completions(torch.ones(3), torch.ones(3)),
            ValueError,
            r"mask must have shape",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
