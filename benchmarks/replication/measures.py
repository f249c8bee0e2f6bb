"""What is measured: of each step, and of a model on held-out problems."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.replication.tasks import Task
from benchmarks.replication.training import build_sampler
from igrpo_algo import DraftRules, Rollouts, TextSplice, two_stage_rollout
from igrpo_algo.drafts.select import SelectedDrafts
from igrpo_algo.metrics import (
    accuracy_after_draft,
    copy_rate,
    pass_at_k,
    stage_uplift,
    zero_variance_rate,
)
from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.rollouts.sampling import sample_group

RIGHT = 1.0


def of_step(rollouts: Rollouts, splice: TextSplice) -> dict[str, float]:
    """Measure what a step sampled; NaN where it has no such stage."""
    drafts, refinements = rollouts.draft_rewards, rollouts.refinement_rewards
    has_drafts = drafts.shape[1] > 0
    plain = rollouts.drafts.flat if has_drafts else rollouts.refinements.flat
    first = drafts if has_drafts else refinements
    shown = torch.tensor([each.choices[-1].reward for each in rollouts])
    shown = shown.masked_fill(~rollouts.conditioned, math.nan)
    after_right, after_wrong = accuracy_after_draft(refinements, shown)
    return {
        "reward": float(first.nanmean()),
        "accuracy": share_right(first),
        "entropy": entropy_of(plain),
        "length": fmean(len(completion.token_ids) for completion in plain),
        "zero_variance": float(zero_variance_rate(refinements)),
        "draft_zero_variance": float(zero_variance_rate(drafts)) if has_drafts else math.nan,
        "uplift": float(stage_uplift(drafts, refinements)) if has_drafts else math.nan,
        "copy_rate": copies_of(rollouts, splice),
        "after_right": float(after_right),
        "after_wrong": float(after_wrong),
        "shown": float(rollouts.conditioned.float().mean()),
    }


def of_model(
    model: Any, tokenizer: Any, task: Task, problems: Sequence[Any], *,
    splice: TextSplice, seed: int, samples: int, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure a model: single-shot (greedy, sampled, pass@k), and draft-then-refine.

    At test time there is no reward: what is refined is the answer of the round before.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        task: The task.
        problems: Held-out problems.
        splice: How drafts are shown.
        seed: Of all samples.
        samples: Answers to each problem. With one, greedy decoding is left out.
        rounds: Of refinement.
    """
    prompts = [task.ask(problem) for problem in problems]
    sampler = build_sampler(model, tokenizer, task)
    chains = two_stage_rollout(
        prompts, sampler, task.reward, num_drafts=1, num_refinements=1, rounds=rounds,
        columns={"problem": problems}, rules=DraftRules(latest, splice=splice), seed=seed,
    )  # fmt: skip
    first = chains.until_round(1)
    after_right, after_wrong = accuracy_after_draft(
        first.refinement_rewards, first.draft_rewards[:, 0]
    )
    found = {
        "entropy": entropy_of(chains.drafts.flat),
        "length": float(chains.draft_lengths.float().mean()),
        "reward": float(chains.draft_rewards.mean()),
        "sampled": share_right(chains.draft_rewards),
        "refined": [
            share_right(chains.until_round(number).refinement_rewards)
            for number in range(1, rounds + 1)
        ],
        "refined_reward": float(first.refinement_rewards.mean()),
        "after_right": float(after_right),
        "after_wrong": float(after_wrong),
        "copy_rate": copies_of(first, splice),
    }
    if samples > 1:
        drawn = sample_group(prompts, sampler, samples, seed=seed + 1).completions
        rewards = torch.tensor(
            [[task.score(each.text, p) for each in g] for g, p in zip(drawn, problems, strict=True)]
        )
        greedy = build_sampler(model, tokenizer, task, temperature=0.0)
        guesses = sample_group(prompts, greedy, 1).flat
        found |= {
            "sampled": share_right(rewards),
            "reward": float(rewards.mean()),
            "pass_at_k": {k: float(pass_at_k(rewards, k).mean()) for k in (1, 2, samples)},
            "greedy": fmean(
                task.score(each.text, p) >= RIGHT for each, p in zip(guesses, problems, strict=True)
            ),
        }
    return found


def latest(rewards: Tensor, *, tie_scores: Tensor | None = None) -> SelectedDrafts:
    """Choose the newest completion, as a user without a reward does."""
    last = torch.full(rewards.shape[:1], rewards.shape[1] - 1)
    return SelectedDrafts(last, rewards[:, -1], torch.ones_like(last, dtype=torch.bool))


def share_right(rewards: Tensor) -> float:
    """Share of rewards that are those of a right answer."""
    return float((rewards >= RIGHT).float().mean())


def entropy_of(completions: Sequence[Completion]) -> float:
    """Mean of -log p over all sampled tokens: an unbiased estimate of the entropy, in nats."""
    return -fmean(value for completion in completions for value in completion.logprobs or ())


def copies_of(rollouts: Rollouts, splice: TextSplice) -> float:
    """Share of the last round's refinements that repeat their draft; NaN where none is shown.

    Where drafts are shown without their thinking, a refinement's own is not looked at either.
    """
    drafts = [each.choices[-1].draft for each in rollouts]
    return copy_rate(drafts, rollouts.refinements.texts, strip=splice.strip)


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average rows of measures; NaN stands for what a row lacks, and is left out."""
    means = {}
    for name in rows[0]:
        known = [row[name] for row in rows if not math.isnan(row[name])]
        means[name] = fmean(known) if known else math.nan
    return means
