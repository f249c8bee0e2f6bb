"""Intervals against their formulas, published numbers, and their own promise."""

import math
import statistics

import pytest
import torch

from igrpo_algo.cli.intervals import Interval, bounded_mean_interval, mean_interval

NAN = float("nan")
Z95 = 1.959963984540054


@pytest.mark.parametrize(
    ("count", "t"),
    [(2, 12.706), (4, 3.182), (10, 2.262), (30, 2.045), (121, 1.980)],  # any printed table
)
def test_mean_interval_is_student_s(count: int, t: float) -> None:
    values = torch.rand(count, dtype=torch.float64).tolist()
    mean, low, high = mean_interval([*values, NAN])
    half = t * statistics.stdev(values) / math.sqrt(count)
    # The table has three decimals.
    assert mean == pytest.approx(statistics.fmean(values), rel=1e-12)
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=3e-4)


def test_one_value_has_a_mean_and_no_interval() -> None:
    mean, low, high = mean_interval([0.5, NAN])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)
    assert all(map(math.isnan, mean_interval([NAN])))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    runs = torch.randn(400, 4).tolist()
    held = sum(
        low <= 0 <= high for _, low, high in (mean_interval(r, confidence=0.8) for r in runs)
    )
    # Binomial(400, 0.8) has deviation 8; the normal quantile would hold 71 %.
    assert 300 <= held <= 340


@pytest.mark.parametrize(
    ("low", "high", "excludes"),
    [(0.01, 0.2, True), (-0.2, -0.01, True), (-0.1, 0.1, False), (0.0, 0.1, False)],
)
def test_an_interval_that_touches_zero_tells_nothing_apart(low, high, excludes) -> None:
    assert Interval((low + high) / 2, low, high).excludes_zero is excludes


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
    outcomes = [float(i < correct) for i in range(tries)] + [NAN]
    assert bounded_mean_interval(outcomes) == pytest.approx([correct / tries, low, high], abs=5e-5)


def test_wilson_mirrors() -> None:
    correct = [1.0, 0.0, 0.0, 1.0, 0.0]
    interval = bounded_mean_interval(correct, confidence=0.9)
    mean, low, high = bounded_mean_interval([1 - c for c in correct], confidence=0.9)
    assert interval == pytest.approx([1 - mean, 1 - high, 1 - low], rel=1e-12)
    assert all(map(math.isnan, bounded_mean_interval([NAN])))


def test_wilson_stays_between_zero_and_one() -> None:
    for tries in range(1, 40):
        assert 0 <= bounded_mean_interval([0.0] * tries).low <= 1e-12
        assert 1 - 1e-12 <= bounded_mean_interval([1.0] * tries).high <= 1


def test_bounded_mean_is_wilson_s_formula_over_prompts() -> None:
    p, n, z2 = 1.75 / 4, 4, Z95**2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    margin = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    found = bounded_mean_interval([0.25, 1.0, 0.5, NAN, 0.0])
    assert found == pytest.approx([p, center - margin, center + margin], rel=1e-12)


def test_bounded_mean_holds_the_truth_with_few_prompts() -> None:
    rates = torch.rand(400, 6)
    shares = torch.bernoulli(rates[:, :, None].expand(400, 6, 4)).mean(-1).tolist()
    held = sum(each.low <= 0.5 <= each.high for each in map(bounded_mean_interval, shares))
    assert held >= 380


@pytest.mark.parametrize("interval", [mean_interval, bounded_mean_interval])
def test_more_confidence_is_wider(interval) -> None:
    wide, narrow = (interval([1.0, 0.0, 1.0, 1.0], confidence=each) for each in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


@pytest.mark.parametrize("confidence", [0, 1, 1.5, -0.5])
@pytest.mark.parametrize("interval", [mean_interval, bounded_mean_interval])
def test_confidence_is_a_share(interval, confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence must be"):
        interval([1.0, 0.0], confidence=confidence)


@pytest.mark.parametrize("value", [1.5, -0.25, math.inf])
def test_bounded_mean_refuses_what_is_not_bounded(value: float) -> None:
    with pytest.raises(ValueError, match=rf"scores must be from 0 to 1 or NaN, got {value}"):
        bounded_mean_interval([0.5, NAN, value])
