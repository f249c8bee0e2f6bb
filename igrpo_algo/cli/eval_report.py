"""The numbers of `igrpo eval` and its table, from the records of its answers."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..metrics import copy_rate, pass_at_k, stage_uplift
from .intervals import bounded_mean_interval, mean_interval
from .metrics_file import Record

STAGES = {"single": "single-shot", "drafts": "drafts", "refinements": "refined"}
CONFIDENCE = 0.95
MANY_PROMPTS = 30
"""With this many prompts or more, their mean counts as normal."""


def report(
    records: Sequence[Record],
    rewards: Sequence[str],
    ks: Sequence[int],
    success_reward: float,
) -> dict[str, Any]:
    """Compute all results of an evaluation.

    Every prompt has the same weight, and intervals are over prompts, not over samples: Wilson's
    (`bounded_mean_interval`) with fewer than 30 scored prompts, with one answer per prompt and
    where all prompts score the same, so that none has zero width; otherwise Student's, cut to
    [0, 1]. Answers that could not be scored are left out and counted. A refinement is a copy if,
    without its thinking, it is the draft as the prompt showed it.

    Args:
        records: One per prompt, as `samples.jsonl` holds them.
        rewards: Names of the rewards; the first says what is right.
        ks: The k of pass@k; those above a stage's number of answers are left out there.
        success_reward: Score from which an answer is right.

    Returns:
        Results for JSON, per stage `pass@k` with mean, low and high, mean rewards, tokens, the rate
        of answers cut by their token limit, and the number of unscored answers.
    """
    results: dict[str, Any] = {"prompts": len(records), "confidence": CONFIDENCE}
    scores = {}
    for stage in STAGES:
        if stage in records[0]:
            scores[stage] = _scores(records, stage, rewards[0])
            results[stage] = _stage_report(records, stage, rewards) | {
                f"pass@{k}": _interval(scores[stage], k, success_reward)
                for k in ks
                if k <= scores[stage].shape[1]
            }
    if "refinements" in scores:
        right = {name: _success(each, success_reward) for name, each in scores.items()}
        results["uplift"] = float(stage_uplift(right["drafts"], right["refinements"]))
        shown = [row["shown"] for row in records]
        texts = [[answer["text"] for answer in row["refinements"]] for row in records]
        results["copy_rate"] = copy_rate(shown, texts)
    return results


def _scores(records: Sequence[Record], stage: str, reward: str) -> Tensor:
    """Collect the scores of a stage, NaN where there is none. Shape [P, n]."""
    return torch.tensor(
        [
            [torch.nan if (s := answer["scores"][reward]) is None else s for answer in row[stage]]
            for row in records
        ],
        dtype=torch.float64,
    )


def _success(scores: Tensor, threshold: float) -> Tensor:
    return (scores >= threshold).to(scores.dtype).where(~scores.isnan(), torch.nan)


def _interval(scores: Tensor, k: int, threshold: float) -> dict[str, float]:
    # pass@k is a product of ratios: it may leave [0, 1] by a rounding error.
    per_prompt = pass_at_k(scores, k, threshold=threshold).clamp(0, 1)
    scored = per_prompt[~per_prompt.isnan()].tolist()
    one_try = scores.shape[1] == 1
    if one_try or len(scored) < MANY_PROMPTS or min(scored) == max(scored):
        return bounded_mean_interval(scored, confidence=CONFIDENCE)._asdict()
    mean, low, high = mean_interval(scored, confidence=CONFIDENCE)
    return {"mean": mean, "low": max(low, 0.0), "high": min(high, 1.0)}


def _stage_report(
    records: Sequence[Record], stage: str, rewards: Sequence[str]
) -> dict[str, float | int]:
    answers = [answer for row in records for answer in row[stage]]
    means = {name: float(_scores(records, stage, name).nanmean()) for name in rewards}
    return {
        "answers": sum(len(row[stage]) for row in records),
        "unscored": sum(answer["scores"][rewards[0]] is None for answer in answers),
        **{f"reward/{name}": mean for name, mean in means.items()},
        "tokens": fmean(answer["tokens"] for answer in answers),
        "cut_short": fmean(answer["finish_reason"] == "length" for answer in answers),
    }


def print_report(results: dict[str, Any], output_dir: Path) -> None:
    """Print the results as a table, one column per stage."""
    from rich.console import Console
    from rich.table import Table

    stages = [stage for stage in STAGES if stage in results]
    title = f"{results['prompts']} prompts, {CONFIDENCE:.0%} intervals"
    table = Table("", *(STAGES[stage] for stage in stages), title=title)
    for name in dict.fromkeys(name for stage in stages for name in results[stage]):
        table.add_row(name, *(_cell(results[stage].get(name)) for stage in stages))
    console = Console()
    console.print(table)
    if "uplift" in results:
        console.print(
            f"uplift of refining over drafting {results['uplift']:+.3f}, "
            f"copy rate {results['copy_rate']:.1%}"
        )
    console.print(f"answers and numbers: {output_dir}", soft_wrap=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return str(value) if isinstance(value, int) else f"{value:.3g}"
