"""`igrpo eval`: how often a model is right, single-shot and after refining a draft of its own."""

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..drafts.rules import DraftRules, Ties
from ..drafts.select import select_random_draft
from ..drafts.splice import TextSplice, TokenBudget
from ..files import sole_writer
from ..rollouts.progress import RolloutProgress, show_live
from ..rollouts.records import Rollout, Rollouts, Stage
from ..rollouts.sampling import Sampler
from ..rollouts.scoring import Reward, Scorer
from ..rollouts.two_stage import two_stage_rollout
from ..seeds import derive_seed
from . import options
from .data import Row
from .errors import run_errors, usage_errors
from .eval_report import print_report, report
from .metrics_file import MetricsFile, Record, write_json
from .run_folder import SETTINGS, check_settings, save_settings

if TYPE_CHECKING:
    from ..engines.base import EngineSampler
    from ..engines.transformers import TransformersSampler

PAPER_TOP_P = 0.95


class DraftChoice(StrEnum):
    """Which draft is refined: any one, or the one that the reward likes best."""

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
        seed: Fixes the samples.
    """

    samples: int
    drafts: int
    refinements: int
    draft_choice: DraftChoice
    batch_size: int
    success_reward: float
    ks: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be >= 1")
        if not all(1 <= k <= self.samples for k in self.ks):
            raise ValueError(f"--k must be from 1 to --samples = {self.samples}, got {self.ks}")


def evaluate(
    model: options.Model,
    dataset: options.Dataset,
    reward: options.Rewards = "math",
    samples: Annotated[int, typer.Option(help="Single-shot answers per prompt.")] = 8,
    k: Annotated[str | None, typer.Option(help="The k of pass@k, by commas (1, samples).")] = None,
    draft_then_refine: Annotated[
        str | None, typer.Option(help="N:G - also draw N drafts, then G refinements of one.")
    ] = None,
    draft_choice: Annotated[
        DraftChoice,
        typer.Option(help="Draft to refine. 'best' asks the reward, which knows the answer."),
    ] = DraftChoice.RANDOM,
    success_reward: Annotated[
        float, typer.Option(help="Score of the first reward from which an answer is right.")
    ] = 1.0,
    output_dir: Annotated[
        Path, typer.Option(help="summary.json and samples.jsonl; a stopped run goes on here.")
    ] = Path("runs/eval"),
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 1024,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.6,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus (0.95; all tokens at temperature 0).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Fixes the samples.")] = 0,
    split: options.Split = "test",
    dataset_config: options.DatasetConfig = None,
    question_column: options.QuestionColumn = None,
    answer_column: options.AnswerColumn = None,
    system_prompt: options.SystemPrompt = None,
    limit: options.Limit = None,
    chat_template_kwargs: options.ChatTemplateKwargs = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Score a model on a prompt set: pass@1, pass@k and their 95 % confidence intervals.

    The first reward says what is right; the others are averaged beside it. Temperature and top-p
    are those of the paper's evaluation. Answers are kept prompt by prompt, and the same command
    goes on where a stopped one was. A draft is shown as in training: without its thinking and
    special tokens, and cut at its head where the prompt would not fit the model's context.
    """
    with ExitStack() as held:
        with usage_errors("eval"):
            drafts, refinements = _parse_split(draft_then_refine)
            ks = tuple(sorted({1, samples} if k is None else set(_parse_counts("--k", k, ","))))
            protocol = Protocol(
                samples, drafts, refinements, draft_choice, batch_size, success_reward, ks, seed
            )
            rewards = options.load_rewards(reward)
            reading: dict[str, Any] = {
                "split": split,
                "config": dataset_config,
                "question_column": question_column,
                "answer_column": answer_column,
                "system_prompt": system_prompt,
                "limit": limit,
            }
            if top_p is None:
                top_p = PAPER_TOP_P if temperature > 0 else 1.0
            sampling: dict[str, Any] = {
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "chat_template_kwargs": options.parse_kwargs(chat_template_kwargs),
            }
            settings = {
                "model": model, "dataset": dataset, "reward": reward, **asdict(protocol),
                **reading, **sampling,
            }  # fmt: skip
            held.enter_context(sole_writer(output_dir))
            if (output_dir / SETTINGS).exists():
                check_settings(output_dir, settings)
            tokenizer = options.load_tokenizer(model, trust_remote_code=trust_remote_code)
            rows = options.load_rows(dataset, tokenizer, list(rewards.values()), **reading)
            sampler = load_sampler(
                model, tokenizer, trust_remote_code=trust_remote_code, **sampling
            )
            answers = MetricsFile(output_dir / "samples.jsonl")
            save_settings(output_dir, settings)
        with run_errors("eval"):
            rules = draft_rules(draft_choice, sampler)
            answer_all(rows, sampler, rewards, protocol, rules, answers)
        results = report(answers.read(), list(rewards), ks, success_reward)
        write_json(output_dir / "summary.json", {"settings": settings, **results})
        print_report(results, output_dir)


def load_sampler(
    model: str, tokenizer: Any, *, trust_remote_code: bool, **options: Any
) -> "TransformersSampler":
    """Load a model onto the accelerator, if there is one, and make a sampler of it."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..engines.transformers import TransformersSampler

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", trust_remote_code=trust_remote_code
    )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return TransformersSampler(loaded.to(device or "cpu"), tokenizer, **options)


def draft_rules(choice: DraftChoice, sampler: "EngineSampler") -> DraftRules:
    """Show drafts as the trainer does; they are cut to fit the context, the question never is."""
    budget = TokenBudget(
        sampler.tokenizer,
        max_prompt_tokens=sampler.max_prompt_tokens,
        chat_template_kwargs=sampler.chat_template_kwargs,
    )
    splice = TextSplice(special_tokens=sampler.control_tokens, budget=budget)
    if choice is DraftChoice.BEST:
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
    """Answer the prompts that the file does not hold yet, batch by batch, with a live line."""
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
    """Answer one batch of prompts in each way that the protocol names; one record per prompt."""
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
    """Give each completion of a stage with its score by every reward; the first is known."""
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


def _parse_split(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 0
    counts = _parse_counts("--draft-then-refine", text, ":")
    if len(counts) != 2 or min(counts) < 1:
        raise ValueError(f"--draft-then-refine wants N:G, both at least 1, got {text!r}")
    return counts[0], counts[1]


def _parse_counts(option: str, text: str, separator: str) -> list[int]:
    try:
        return [int(part) for part in text.split(separator)]
    except ValueError:
        raise ValueError(
            f"{option} wants whole numbers separated by {separator!r}, got {text!r}"
        ) from None
