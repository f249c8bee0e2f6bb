"""Intervals against their formulas in Python floats, published numbers, and their own promise."""

import math
import statistics

import pytest
import torch

from igrpo_algo.cli.intervals import (
    Interval,
    bounded_mean_interval,
    mean_confidence_interval,
    wilson_interval,
)

NAN = float("nan")
Z95 = 1.959963984540054


def numbers(interval: Interval) -> list[float]:
    return [bound.item() for bound in interval]


def test_interval_is_that_of_the_means_of_prompts() -> None:
    rewards = torch.rand(12, 5, dtype=torch.float64)
    rewards[3, :2] = NAN
    means = [statistics.fmean(r for r in row if not math.isnan(r)) for row in rewards.tolist()]
    margin = Z95 * statistics.stdev(means) / math.sqrt(12)
    middle = statistics.fmean(means)
    wanted = [middle, middle - margin, middle + margin]
    assert numbers(mean_confidence_interval(rewards)) == pytest.approx(wanted, rel=1e-12)
    with_unscored = torch.cat([rewards, torch.full((2, 5), NAN).double()])
    assert numbers(mean_confidence_interval(with_unscored)) == pytest.approx(wanted, rel=1e-12)


def test_copies_of_a_sample_add_no_confidence() -> None:
    once = torch.randint(0, 2, (40, 1)).double()
    repeated = mean_confidence_interval(once.expand(40, 8))
    assert numbers(repeated) == pytest.approx(numbers(mean_confidence_interval(once)), rel=1e-12)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    runs, prompts = 400, 60
    rates = torch.rand(runs, prompts)
    correct = torch.bernoulli(rates[:, :, None].expand(runs, prompts, 4))
    held = 0
    for each in correct:
        _, low, high = mean_confidence_interval(each, confidence=0.8)
        held += bool(low <= 0.5 <= high)
    # Binomial(400, 0.8) has deviation 8; treating samples as independent would hold some 65 %.
    assert 290 <= held <= 350


def test_one_prompt_has_no_interval() -> None:
    mean, low, high = mean_confidence_interval(torch.tensor([[1.0, 0.0], [NAN, NAN]]))
    assert mean == 0.5
    assert low.isnan()
    assert high.isnan()


@pytest.mark.parametrize(
    ("correct", "tries", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_published_numbers(
    correct: int, tries: int, low: float, high: float
) -> None:
    outcome = torch.arange(tries) < correct
    found = numbers(wilson_interval(outcome))
    assert found == pytest.approx([correct / tries, low, high], abs=5e-5)


def test_wilson_leaves_out_the_unscored_and_mirrors() -> None:
    correct = torch.tensor([1.0, 0.0, 0.0, NAN, 1.0, 0.0], dtype=torch.float64)
    interval = numbers(wilson_interval(correct, confidence=0.9))
    scored = correct[~correct.isnan()]
    assert interval == pytest.approx(numbers(wilson_interval(scored, confidence=0.9)), rel=1e-12)
    mean, low, high = numbers(wilson_interval(1 - scored, confidence=0.9))
    assert interval == pytest.approx([1 - mean, 1 - high, 1 - low], rel=1e-12)
    for bound in wilson_interval(torch.tensor([NAN])):
        assert bound.isnan()


def test_wilson_stays_between_zero_and_one() -> None:
    for tries in range(1, 40):
        low = wilson_interval(torch.zeros(tries)).low.item()
        high = wilson_interval(torch.ones(tries)).high.item()
        # float32: a sum and a root of numbers near 1.
        assert 0 <= low <= 1e-6
        assert 1 - 1e-6 <= high <= 1


def test_more_confidence_is_wider() -> None:
    rewards = torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    for interval in (mean_confidence_interval, lambda r, **kw: wilson_interval(r[:, 0], **kw)):
        wide, narrow = (interval(rewards, confidence=each) for each in (0.99, 0.5))
        assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


@pytest.mark.parametrize("confidence", [0, 1, 1.5, -0.5])
def test_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence must be"):
        mean_confidence_interval(torch.ones(2, 2), confidence=confidence)
    with pytest.raises(ValueError, match="confidence must be"):
        wilson_interval(torch.ones(2), confidence=confidence)


def test_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"rewards must have shape \[P, N\], got \[2\]"):
        mean_confidence_interval(torch.ones(2))
    with pytest.raises(ValueError, match=r"correct must have shape \[P\], got \[2, 2\]"):
        wilson_interval(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"correct must be a torch\.Tensor"):
        wilson_interval([1, 0])


def test_bounded_mean_is_wilson_s_formula_over_prompts() -> None:
    scores = torch.tensor([0.25, 1.0, 0.5, NAN, 0.0], dtype=torch.float64)
    p, n, z2 = 1.75 / 4, 4, Z95**2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    margin = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    found = numbers(bounded_mean_interval(scores))
    assert found == pytest.approx([p, center - margin, center + margin], rel=1e-12)
    tries = torch.tensor([1, 0, 0, 1])
    assert bounded_mean_interval(tries) == wilson_interval(tries)


def test_bounded_mean_holds_the_truth_with_few_prompts() -> None:
    runs, prompts = 400, 6
    rates = torch.rand(runs, prompts)
    shares = torch.bernoulli(rates[:, :, None].expand(runs, prompts, 4)).mean(-1)
    held = sum(bool(each.low <= 0.5 <= each.high) for each in map(bounded_mean_interval, shares))
    assert held >= 380


@pytest.mark.parametrize("value", [0.5, 2.0, 7.0, -1.0, math.inf])
def test_wilson_refuses_what_is_no_try(value: float) -> None:
    with pytest.raises(ValueError, match=rf"correct must hold 0, 1 or NaN, got {value}"):
        wilson_interval(torch.tensor([1.0, NAN, value]))


@pytest.mark.parametrize("value", [1.5, -0.25])
def test_bounded_mean_refuses_what_is_not_bounded(value: float) -> None:
    with pytest.raises(ValueError, match=rf"scores must be from 0 to 1 or NaN, got {value}"):
        bounded_mean_interval(torch.tensor([0.5, NAN, value]))
    with pytest.raises(ValueError, match=r"scores must have shape \[P\], got \[2, 2\]"):
        bounded_mean_interval(torch.ones(2, 2))
