"""How sure to be of a measured accuracy: confidence intervals that know their samples' prompts.

Pure functions of rewards, with NaN for an unscored one. Results are detached tensors on the device
of the rewards, and nothing here waits for it.
"""

from statistics import NormalDist
from typing import NamedTuple

from torch import Tensor

from igrpo_kernels.checks import check_number, check_rank, describe

from ..advantages.moments import to_scores


class Interval(NamedTuple):
    """A mean and its confidence interval, three scalars.

    Examples:
        >>> import torch
        >>> mean, low, high = wilson_interval(torch.tensor([1, 0]))
        >>> bool(low < mean < high)
        True
    """

    mean: Tensor
    low: Tensor
    high: Tensor


def mean_confidence_interval(rewards: Tensor, *, confidence: float = 0.95) -> Interval:
    """Mean reward over prompts, and how far it may be off, samples clustered by prompt.

    mean = mean_p m_p,    m_p = mean_n r_pn,    low, high = mean -+ z std_p(m_p) / sqrt(P)

    Samples of one prompt resemble each other, so the P means of prompts are what is independent,
    not the P N samples; their deviation (ddof 1) holds the spread within prompts too. z is the
    normal quantile, so P should be 30 or more; with few prompts, or accuracies near 0 or 1, prefer
    `bounded_mean_interval`. Prompts without a scored sample are left out; the bounds are NaN for
    fewer than two prompts. Miller 2024, arXiv:2411.00640, sections 2.1 and 2.2.

    Args:
        rewards: Reward of each sample, NaN where unscored. Shape [P, N].
        confidence: Share of such intervals that hold the true mean.

    Returns:
        Mean, low and high: scalars in float32 or float64, detached. Not cut to any range.

    Raises:
        TypeError: `rewards` is no tensor of real numbers, or `confidence` no number.
        ValueError: `rewards` are not [P, N], or `confidence` is not strictly between 0 and 1.

    Examples:
        >>> import torch
        >>> interval = mean_confidence_interval(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
        >>> [round(bound.item(), 3) for bound in interval]
        [0.5, -0.066, 1.066]
    """
    z = _normal_quantile(confidence)
    means = check_rank("rewards", to_scores("rewards", rewards), 2, "[P, N]").nanmean(-1)
    prompts = (~means.isnan()).sum()
    mean = means.nanmean()
    variance = (means - mean).square().nansum() / (prompts - 1)
    margin = z * (variance / prompts).sqrt()
    return Interval(mean, mean - margin, mean + margin)


def wilson_interval(correct: Tensor, *, confidence: float = 0.95) -> Interval:
    """Accuracy over independent tries, one per prompt, and how far it may be off.

    with p = mean(correct), z the normal quantile, n the number of tries:
    low, high = ( p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2) ) / (1 + z^2 / n)

    Sound for few prompts and for accuracies at 0 and 1, where the normal interval has no width. For
    several samples per prompt, which are not independent, see `mean_confidence_interval` and
    `bounded_mean_interval`. Values are read, and so checked, on the CPU only: to read them from an
    accelerator is to wait for it. Wilson 1927, JASA 22(158).

    Args:
        correct: 1 (or True) where the try succeeded, 0 where not, NaN where unscored. Shape [P].
        confidence: Share of such intervals that hold the true accuracy.

    Returns:
        Mean, low and high: scalars in float32 or float64, detached. All NaN without a scored try.

    Raises:
        TypeError: `correct` is no tensor of real numbers, or `confidence` no number.
        ValueError: `correct` is not [P] or (on the CPU) holds another number than 0, 1 and NaN, or
            `confidence` is not strictly between 0 and 1.

    Examples:
        >>> import torch
        >>> interval = wilson_interval(torch.tensor([1, 1, 1, 1]))
        >>> [round(bound.item(), 3) for bound in interval]
        [1.0, 0.51, 1.0]
    """
    z = _normal_quantile(confidence)
    scores = check_rank("correct", to_scores("correct", correct), 1, "[P]")
    allowed = (scores == 0) | (scores == 1) | scores.isnan()
    if correct.device.type == "cpu" and not allowed.all():
        raise ValueError(f"correct must hold 0, 1 or NaN, got {scores[~allowed][0].item()}")
    return _wilson(scores, z)


def bounded_mean_interval(scores: Tensor, *, confidence: float = 0.95) -> Interval:
    """Mean of one score in [0, 1] per prompt, and how far it may be off, by Wilson's formula.

    low, high = those of `wilson_interval`, with p = mean(scores) and n the number of prompts

    A score in [0, 1] varies at most as a try of the same mean does: Var(s) <= p (1 - p), for
    s^2 <= s. The interval is thus rather too wide than too narrow, and never without width, even
    with few prompts and where all scores are the same. The score is what summarizes a prompt's
    samples, the share of right ones or pass@k: prompts are what is independent. With many prompts
    `mean_confidence_interval` is narrower. Values are checked on the CPU only. Wilson 1927, JASA
    22(158).

    Args:
        scores: One number from 0 to 1 per prompt, NaN where unscored. Shape [P].
        confidence: Share of such intervals that hold the true mean, nearly, or more of them.

    Returns:
        Mean, low and high: scalars in float32 or float64, detached. All NaN where none is scored.

    Raises:
        TypeError: `scores` is no tensor of real numbers, or `confidence` no number.
        ValueError: `scores` is not [P] or (on the CPU) leaves [0, 1], or `confidence` is not
            strictly between 0 and 1.

    Examples:
        >>> import torch
        >>> interval = bounded_mean_interval(torch.tensor([0.0, 0.0]))
        >>> [round(bound.item(), 3) for bound in interval]
        [0.0, 0.0, 0.658]
    """
    z = _normal_quantile(confidence)
    values = check_rank("scores", to_scores("scores", scores), 1, "[P]")
    allowed = ((values >= 0) & (values <= 1)) | values.isnan()
    if scores.device.type == "cpu" and not allowed.all():
        raise ValueError(f"scores must be from 0 to 1 or NaN, got {values[~allowed][0].item()}")
    return _wilson(values, z)


def _wilson(scores: Tensor, z: float) -> Interval:
    tries = (~scores.isnan()).sum().to(scores.dtype)
    mean = scores.nanmean()
    center = mean + z**2 / (2 * tries)
    margin = z * (mean * (1 - mean) / tries + z**2 / (4 * tries**2)).sqrt()
    low, high = ((center + side) / (1 + z**2 / tries) for side in (-margin, margin))
    return Interval(mean, low.clamp(min=0), high.clamp(max=1))


def _normal_quantile(confidence: float) -> float:
    check_number("confidence", confidence, above=0)
    if confidence >= 1:
        raise ValueError(f"confidence must be < 1, got {describe(confidence)}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
