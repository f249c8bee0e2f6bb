"""What `igrpo eval` draws and scores for each prompt: one record per prompt, batch by batch."""

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from igrpo_kernels.checks import check_count, check_number

from ..drafts.rules import DraftRules, Ties
from ..drafts.select import select_random_draft
from ..drafts.splice import TextSplice, TokenBudget
from ..rollouts.progress import RolloutProgress, show_live
from ..rollouts.records import Rollout, Rollouts, Stage
from ..rollouts.sampling import Sampler
from ..rollouts.scoring import Reward, Scorer
from ..rollouts.two_stage import two_stage_rollout
from ..seeds import derive_seed
from .data import Row
from .metrics_file import MetricsFile, Record

if TYPE_CHECKING:
    from ..engines.base import EngineSampler


class RefinedDraft(StrEnum):
    """Which draft is refined: any one, or the one of highest reward."""

    RANDOM = "random"
    BEST = "best"


@dataclass(frozen=True)
class Protocol:
    """How each prompt is answered, and what counts as right.

    Attributes:
        samples: Single-shot answers per prompt.
        drafts: N of draft-then-refine; 0 leaves it out.
        refinements: G of draft-then-refine.
        draft_choice: Which draft is refined.
        batch_size: Prompts per call of the sampler.
        success_reward: Score of the first reward from which an answer is right.
        ks: The k of pass@k.
        seed: The seed of all samples.
    """

    samples: int
    drafts: int
    refinements: int
    draft_choice: RefinedDraft
    batch_size: int
    success_reward: float
    ks: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            check_count(f"--{name.replace('_', '-')}", getattr(self, name))
        check_count("--seed", self.seed, at_least=0)
        if not all(1 <= k <= self.samples for k in self.ks):
            raise ValueError(f"--k must be from 1 to --samples = {self.samples}, got {self.ks}")
        check_number("--success-reward", self.success_reward)
        if self.drafts < 2 and self.draft_choice is not RefinedDraft.RANDOM:
            raise ValueError("--draft-choice needs --draft-then-refine with at least 2 drafts")


def draft_rules(choice: RefinedDraft, sampler: "EngineSampler") -> DraftRules:
    """Show drafts as the trainer does; they are cut to fit the context, the question never is."""
    budget = TokenBudget(
        sampler.tokenizer,
        max_prompt_tokens=sampler.max_prompt_tokens,
        chat_template_kwargs=sampler.chat_template_kwargs,
    )
    splice = TextSplice(special_tokens=sampler.control_tokens, budget=budget)
    if choice is RefinedDraft.BEST:
        return DraftRules(splice=splice)
    return DraftRules(select_random_draft, ties=Ties.RANDOM, splice=splice)


def answer_all(
    rows: Sequence[Row],
    sampler: Sampler,
    rewards: Mapping[str, Reward],
    protocol: Protocol,
    rules: DraftRules,
    file: MetricsFile,
) -> None:
    """Answer the prompts that are not in the file yet, batch by batch, with a live line."""
    size = protocol.batch_size
    finished = min(len(file.read()), len(rows))
    start = finished if finished == len(rows) else finished - finished % size
    file.truncate(lambda row: row["index"] < start)
    left = len(rows) - start
    lines = {"single-shot": RolloutProgress(left, label="single-shot")}
    if protocol.drafts:
        lines["refined"] = RolloutProgress(left, label="draft, then refine")
    with show_live(*lines.values()) if left else nullcontext():
        for first in range(start, len(rows), size):
            batch = rows[first : first + size]
            file.append(*answer_batch(batch, first, sampler, rewards, protocol, rules, lines))


def answer_batch(
    rows: Sequence[Row],
    first: int,
    sampler: Sampler,
    rewards: Mapping[str, Reward],
    protocol: Protocol,
    rules: DraftRules,
    lines: Mapping[str, RolloutProgress] | None = None,
) -> Iterator[Record]:
    """Answer one batch of prompts in each way that the protocol asks for; one record per prompt."""
    lines = lines or {}
    prompts = [row["prompt"] for row in rows]
    names = {name for row in rows for name in row if name != "prompt"}
    columns = {name: [row.get(name) for row in rows] for name in sorted(names)}
    seed = derive_seed(protocol.seed, first)
    judge, *_ = rewards.values()
    single = two_stage_rollout(
        prompts,
        sampler,
        judge,
        num_drafts=0,
        num_refinements=protocol.samples,
        columns=columns,
        seed=derive_seed(seed, 0),
        on_progress=lines.get("single-shot"),
    )
    refined: Sequence[Rollout | None] | Rollouts = [None] * len(rows)
    if protocol.drafts:
        refined = two_stage_rollout(
            prompts,
            sampler,
            judge,
            num_drafts=protocol.drafts,
            num_refinements=protocol.refinements,
            columns=columns,
            rules=rules,
            seed=derive_seed(seed, 1),
            on_progress=lines.get("refined"),
        )
    scorers = {name: Scorer(each, prompts, columns, name) for name, each in rewards.items()}
    for index, (row, direct, group) in enumerate(zip(rows, single, refined, strict=True)):
        record = {"index": first + index, "prompt": row["prompt"], "answer": row.get("answer")}
        record["single"] = _answers(index, direct.refinements[0], scorers)
        if group is not None:
            record["drafts"] = _answers(index, group.drafts, scorers)
            record["chosen"] = group.choices[0].index
            record["shown"] = group.choices[0].draft
            record["refinements"] = _answers(index, group.refinements[0], scorers)
        yield record


def _answers(index: int, stage: Stage, scorers: Mapping[str, Scorer]) -> list[Record]:
    """List the completions of a stage with their scores; those by the first reward are known."""
    first, *others = scorers
    scores = {first: stage.rewards} | {
        name: asyncio.run(scorers[name](index, stage.completions)) for name in others
    }
    return [
        {
            "text": completion.text,
            "tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "scores": {name: None if math.isnan(s[i]) else s[i] for name, s in scores.items()},
        }
        for i, completion in enumerate(stage.completions)
    ]
