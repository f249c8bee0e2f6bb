"""`igrpo eval`: how often a model is right, single-shot and after refining a draft of its own."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import sole_writer
from . import options
from .answers import Protocol, RefinedDraft, answer_all, draft_rules
from .errors import run_errors, usage_errors
from .eval_report import print_report, report
from .metrics_file import MetricsFile, write_json
from .run_folder import SETTINGS, check_settings, save_settings
from .samplers import load_sampler

PAPER_TOP_P = 0.95


def evaluate(
    model: options.Model,
    dataset: options.Dataset,
    reward: options.Rewards = "math",
    samples: Annotated[int, typer.Option(help="Single-shot answers per prompt.")] = 8,
    k: Annotated[
        str | None, typer.Option(help="k of pass@k, separated by commas (1 and samples).")
    ] = None,
    draft_then_refine: Annotated[
        str | None, typer.Option(help="N:G, to also draw N drafts and G refinements of one.")
    ] = None,
    draft_choice: Annotated[
        RefinedDraft,
        typer.Option(help="Draft to refine. 'best' asks the reward, which knows the answer."),
    ] = RefinedDraft.RANDOM,
    success_reward: Annotated[
        float, typer.Option(help="Score of the first reward from which an answer is right.")
    ] = 1.0,
    output_dir: Annotated[
        Path, typer.Option(help="summary.json and samples.jsonl; a stopped run continues here.")
    ] = Path("runs/eval"),
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.")] = 1024,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = 0.6,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus (0.95; all tokens at temperature 0).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    split: options.Split = None,
    dataset_config: options.DatasetConfig = None,
    question_column: options.QuestionColumn = None,
    answer_column: options.AnswerColumn = None,
    system_prompt: options.SystemPrompt = None,
    limit: options.Limit = None,
    chat_template_kwargs: options.ChatTemplateKwargs = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Score a model on a prompt set: pass@1, pass@k and their 95 % confidence intervals.

    The first reward decides what is right; the others are averaged beside it. Temperature and top-p
    are those of the paper's evaluation. Answers are saved batch by batch, and the same command
    resumes a stopped run. A draft is shown as in training: without its thinking and special tokens,
    and cut at its head where the prompt would not fit the model's context.
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
            if temperature == 0 and max(samples, drafts, refinements) > 1:
                raise ValueError(
                    "--temperature 0 gives the same answer each time: use --samples 1, and "
                    "--draft-then-refine 1:1"
                )
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
            tokenizer = options.load_tokenizer(model, trust_remote_code=trust_remote_code)
            rows = options.load_rows(
                dataset, tokenizer, list(rewards.values()), default_split="test",
                chat_template_kwargs=sampling["chat_template_kwargs"], **reading,
            )  # fmt: skip
            held.enter_context(sole_writer(output_dir))
            if (output_dir / SETTINGS).exists():
                check_settings(output_dir, settings)
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
