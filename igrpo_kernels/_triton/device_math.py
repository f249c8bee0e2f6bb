# mypy: disable-error-code="no-untyped-def"
"""Device functions that the kernels share: the softmax relative to a reference, log1p and expm1."""

import triton
import triton.language as tl

from ..row_statistics import LARGEST, LOG_FLOOR

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# exp2 underflows to zero far above this; an exponent of -inf would make exp(z) z = 0 * -inf = NaN
LEAST = tl.constexpr(LOG_FLOOR)
# What exponentials relative to the target may add up to; other rows go relative to their maximum
RANGE = tl.constexpr(LARGEST)


@triton.jit
def log1p(x):
    """log(1 + x) to full relative precision: the rounding of 1 + x cancels (Kahan)."""
    rounded = 1.0 + x
    is_tiny = rounded == 1.0
    factor = tl.log(rounded) / tl.where(is_tiny, 1.0, rounded - 1.0)
    return tl.where(is_tiny, x, tl.where(rounded < float("inf"), x * factor, rounded))


@triton.jit
def expm1(x):
    """exp(x) - 1 to full relative precision for x <= 20, by the same trick."""
    rounded = tl.exp(x)
    is_tiny = rounded == 1.0
    is_whole = rounded - 1.0 == -1.0
    logarithm = tl.where(is_tiny | is_whole, 1.0, tl.log(rounded))
    return tl.where(is_tiny, x, tl.where(is_whole, -1.0, (rounded - 1.0) * (x / logarithm)))


@triton.jit
def exponents(products, scale, softcap, to_log2, reference):
    """From products to (z - reference) log2(e), and the slope of the cap.

    z = cap(scale * products) / temperature;  `to_log2` is log2(e) / temperature, and `reference` is
    in the same unit.
    """
    slope = 1.0
    if softcap is not None:
        capped = 2 * tl.sigmoid(products * (2 * scale / softcap)) - 1  # tanh
        slope = 1 - capped * capped
        shifted = capped * (softcap * to_log2) - reference
    else:
        shifted = products * (scale * to_log2) - reference
    return shifted, slope


@triton.jit
def of_sums(others, moment, gap):
    """Log-prob, entropy and total of a row, as in `..row_statistics.RowStatistics.of_sums`."""
    at_target = tl.exp(gap)
    excess = others + (at_target - 1.0)
    log_total = log1p(excess)
    total = 1.0 + excess
    entropy = log_total - (moment + at_target * tl.maximum(gap, LEAST)) / total
    return gap - log_total, entropy, total


@triton.jit
def surprise(logprob, entropy):
    """Minus the slope of the entropy by the token's own logit: p (log p + entropy)."""
    bounded = tl.maximum(logprob, LEAST)
    return tl.exp(bounded) * (bounded + entropy)
