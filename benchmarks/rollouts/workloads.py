"""Long-tailed completion lengths, the same for every variant of a seed."""

import math
import random

from .engine import Workload
from .variants import GROUP


def make_workload(
    prompts: int,
    *,
    seed: int,
    success: float,
    question: int,
    mean: float,
    most: int,
    sigma: float = 0.8,
    shared: float = 0.0,
) -> Workload:
    """Draw lognormal lengths, cut at `most`, and which samples are right.

    Args:
        prompts: P.
        seed: Fixes lengths and successes.
        success: Probability that a completion is right.
        question: Tokens of a question.
        mean: Mean length before the cut.
        most: Longest completion.
        sigma: Standard deviation of the logarithm.
        shared: Share of its variance that belongs to the prompt: a hard one makes all its
            completions long.
    """
    rng = random.Random(seed)
    center = math.log(mean) - sigma**2 / 2
    own, common = math.sqrt(1 - shared), math.sqrt(shared)
    lengths, right = [], []
    for _ in range(prompts):
        hardness = common * rng.gauss(0, 1)
        logs = [center + sigma * (hardness + own * rng.gauss(0, 1)) for _ in range(GROUP)]
        lengths.append([min(most, max(1, round(math.exp(log)))) for log in logs])
        right.append([rng.random() < success for _ in range(GROUP)])
    return Workload(question, lengths, right, GROUP // 2)
