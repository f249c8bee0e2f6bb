"""How a model refines under each draft template, given the same drafts.

    python -m benchmarks.replication.templates FOLDER      # SmolLM2 in FOLDER; one thread, minutes

Drafts are sampled once; each template shows the same ones, and one refinement of each is sampled.
So templates are compared pair by pair: the same question, draft and seed. Each is tried behind
worked examples of answers alone, and behind examples of which one corrects a draft in its words.
What the output has is not measured again.
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks import results
from benchmarks.cases import DTYPES
from benchmarks.options import add_dtype, parser_of
from benchmarks.replication import smollm
from benchmarks.replication.tasks.words import WordProblem, ask, draw, make_task, score
from igrpo_algo.cli.intervals import bounded_mean_interval, mean_interval
from igrpo_algo.drafts.text import (
    DEFAULT_TEMPLATE,
    PAPER_TEMPLATE,
    DraftTemplate,
    splice_prompt,
)
from igrpo_algo.engines.static import StaticSampler
from igrpo_algo.rollouts.completions import Completion, CompletionGroups

ONE_LINE = DraftTemplate(before="\nDraft: ", after="")
TEMPLATES = {
    "default": DEFAULT_TEMPLATE,
    "one line": ONE_LINE,
    "paper": PAPER_TEMPLATE,
}
CORRECTION = "correction shown"
SHOWN = ("answers shown", CORRECTION)
WHAT_AND_WHERE = ("shown", "levels", "output")  # options that the record itself answers


def rights(groups: CompletionGroups, problems: Sequence[WordProblem]) -> list[list[float]]:
    """Score the completions of each problem."""
    return [
        [score(each.text, problem) for each in group]
        for group, problem in zip(groups, problems, strict=True)
    ]


def share(values: Sequence[float]) -> float | None:
    """Average; None where there is nothing."""
    return fmean(values) if values else None


def refine(
    sampler: StaticSampler,
    problems: Sequence[WordProblem],
    drafts: CompletionGroups,
    template: DraftTemplate,
    *,
    corrects: bool,
    seed: int,
) -> CompletionGroups:
    """Draw one refinement of each draft."""
    shown = [
        splice_prompt(
            ask(problem, template if corrects else None),
            draft.text,
            template=template,
            special_tokens=sampler.control_tokens,
        )
        for problem, group in zip(problems, drafts, strict=True)
        for draft in group
    ]
    flat = [group[0] for group in sampler.sample(shown, 1, seed=seed)]
    count = len(drafts[0])
    return [flat[start : start + count] for start in range(0, len(flat), count)]


def summarize(
    refined: Sequence[Sequence[float]],
    drafted: Sequence[Sequence[float]],
    baseline: Sequence[Sequence[float]],
    completions: Sequence[Completion],
) -> dict[str, Any]:
    """Accuracy after right and wrong drafts, and the difference from the default template."""
    pairs = [pair for r, d in zip(refined, drafted, strict=True) for pair in zip(r, d, strict=True)]
    gains = [fmean(one) - fmean(two) for one, two in zip(refined, baseline, strict=True)]
    return {
        "accuracy": share([refinement for refinement, _ in pairs]),
        "after_right": share([refinement for refinement, draft in pairs if draft]),
        "after_wrong": share([refinement for refinement, draft in pairs if not draft]),
        "cut": fmean(each.finish_reason == "length" for each in completions),
        "over_default": mean_interval(gains)._asdict(),
    }


def measure(
    sampler: StaticSampler, options: argparse.Namespace, record: results.Record, output: Path
) -> None:
    """Sample the drafts, refine them under every template; record what is done so far."""
    rng = random.Random(options.seed)
    problems = [draw(rng, (options.level,)) for _ in range(options.problems)]
    drafts = sampler.sample([ask(problem, None) for problem in problems], options.drafts, seed=0)
    drafted = rights(drafts, problems)
    found: dict[str, Any] = json.loads(output.read_bytes()) if output.exists() else record
    found["drafts"] = bounded_mean_interval([fmean(row) for row in drafted])._asdict()
    for shown in options.shown:
        if found.get(shown, {}).keys() == TEMPLATES.keys():
            continue
        rows = found[shown] = {}
        baseline: list[list[float]] = []
        for name, template in TEMPLATES.items():
            refinements = refine(
                sampler, problems, drafts, template, corrects=shown == CORRECTION, seed=1
            )
            refined = rights(refinements, problems)
            baseline = baseline or refined  # the default comes first
            flat = [each for group in refinements for each in group]
            rows[name] = summarize(refined, drafted, baseline, flat)
            print(f"{shown}, {name}: {rows[name]}", flush=True)
            results.write(found, output)


def pretrained_parser(doc: str | None, **counts: int) -> argparse.ArgumentParser:
    """Begin the command of a measurement of a pretrained model."""
    parser = parser_of(doc, threads=1, **counts)
    add_dtype(parser, "bf16")
    parser.add_argument("weights", type=Path, help="the model's folder; made if it is missing")
    parser.add_argument("--seed", type=int, default=7, help="of the problems")
    return parser


def new_record(options: argparse.Namespace, model: Any, name: str) -> tuple[results.Record, Path]:
    """Begin a record of a model, and say where it goes."""
    given: Mapping[str, Any] = {**vars(options), "weights": options.weights.name}
    record = results.about(torch.device("cpu"), "igrpo_algo", "benchmarks/replication")
    record["options"] = {key: value for key, value in given.items() if key not in WHAT_AND_WHERE}
    record["model"] = Path(model.config.name_or_path).name or type(model).__name__
    return record, options.output or results.RESULTS / f"{record['date']}-{name}.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, record."""
    parser = pretrained_parser(__doc__, problems=48, drafts=2)
    parser.add_argument("--level", type=int, default=2, help="operations of a problem")
    parser.add_argument("--shown", nargs="+", choices=SHOWN, default=SHOWN, help="in the examples")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, tokenizer = smollm.load(options.weights, dtype=DTYPES[options.dtype])
    most = make_task((options.level,)).answer_tokens
    sampler = StaticSampler(model, tokenizer, max_new_tokens=most, batch_size=96)
    measure(sampler, options, *new_record(options, model, "templates"))


if __name__ == "__main__":
    main()
