"""Confidence intervals of a mean, over values that are independent of each other.

Samples of one prompt are not, nor are the problems of one training run: pass one value per prompt,
or one per run. NaN marks an unscored one, which is left out.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

from igrpo_kernels.checks import check_list, check_number, describe


class Interval(NamedTuple):
    """A mean and its confidence interval.

    Examples:
        >>> Interval(mean=-0.05, low=-0.08, high=-0.02).excludes_zero
        True
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero is outside the interval."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean over prompts, or over seeds, with Student's t interval.

    low, high = mean -+ t std / sqrt(n),    t of n - 1 degrees of freedom, std with ddof 1

    It takes the mean to be normal: true of many values, and of few that are nearly normal
    themselves. Of few scores near 0 or 1 take `bounded_mean_interval`. Miller 2024,
    arXiv:2411.00640, sections 2.1 and 2.2.

    Args:
        values: One number per prompt, or per seed; NaN where unscored.
        confidence: Share of such intervals that hold the true mean.

    Returns:
        Mean and bounds, the bounds NaN for fewer than two values. Not cut to any range.

    Raises:
        TypeError: `confidence` is not a number.
        ValueError: `confidence` is not strictly between 0 and 1.

    Examples:
        >>> mean_interval([0.25, 0.5, 0.75])
        Interval(mean=0.5, low=-0.121..., high=1.121...)
    """
    from scipy import stats

    _check_confidence(confidence)
    scored = [value for value in check_list("values", values) if not math.isnan(value)]
    mean, margin = fmean(scored) if scored else math.nan, math.nan
    if len(scored) > 1:
        quantile = float(stats.t.ppf((1 + confidence) / 2, len(scored) - 1))
        margin = quantile * stdev(scored) / math.sqrt(len(scored))
    return Interval(mean, mean - margin, mean + margin)


def bounded_mean_interval(scores: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean of scores in [0, 1], one per prompt, with Wilson's interval.

    with p = mean(scores), z the normal quantile, n the number of prompts:
    low, high = ( p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2) ) / (1 + z^2 / n)

    The formula is that of n tries with the outcomes 0 and 1. A score between them varies less,
    Var(s) <= p (1 - p), so its interval is rather too wide than too narrow. It is never without
    width, even for few prompts that all score the same. Wilson 1927, JASA 22(158).

    Args:
        scores: The share of right samples of a prompt, its pass@k, or 0 and 1; NaN where unscored.
        confidence: Share of such intervals that hold the true mean; here nearly so, or more.

    Returns:
        Mean and bounds, all NaN where nothing is scored.

    Raises:
        TypeError: `confidence` is not a number.
        ValueError: A score is outside [0, 1], or `confidence` is not strictly between 0 and 1.

    Examples:
        >>> bounded_mean_interval([0.0, 0.0])
        Interval(mean=0.0, low=0.0, high=0.657...)
    """
    _check_confidence(confidence)
    scored = [score for score in check_list("scores", scores) if not math.isnan(score)]
    if outside := [score for score in scored if not 0 <= score <= 1]:
        raise ValueError(f"scores must be from 0 to 1 or NaN, got {outside[0]}")
    if not scored:
        return Interval(math.nan, math.nan, math.nan)
    n, p = len(scored), fmean(scored)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center = p + z**2 / (2 * n)
    margin = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((center + side) / (1 + z**2 / n) for side in (-margin, margin))
    return Interval(p, max(low, 0.0), min(high, 1.0))


def _check_confidence(confidence: float) -> None:
    check_number("confidence", confidence, above=0)
    if confidence >= 1:
        raise ValueError(f"confidence must be < 1, got {describe(confidence)}")
