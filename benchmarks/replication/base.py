"""What a pretrained model can do before any training: its accuracy on the word problems, by level.

    python -m benchmarks.replication.base FOLDER      # SmolLM2 in FOLDER; one thread, minutes

A task needs headroom: what nobody gets right, or everybody, teaches nothing. Levels that the output
has are not measured again.
"""

import argparse
import json
import random
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from benchmarks import results
from benchmarks.cases import DTYPES
from benchmarks.replication import smollm
from benchmarks.replication.tasks.words import LEVELS, ask, draw, make_task
from benchmarks.replication.templates import new_record, pretrained_parser, rights
from igrpo_algo.cli.intervals import bounded_mean_interval
from igrpo_algo.engines.static import StaticSampler


def measure(model: Any, tokenizer: Any, level: int, options: argparse.Namespace) -> dict[str, Any]:
    """Give the share of right answers to each problem of a level, sampled and greedy."""
    rng = random.Random(f"{options.seed} {level}")
    problems = [draw(rng, (level,)) for _ in range(options.problems)]
    found = {}
    for name, temperature, count in (("sampled", 1.0, options.samples), ("greedy", 0.0, 1)):
        sampler = StaticSampler(
            model,
            tokenizer,
            max_new_tokens=make_task((level,)).answer_tokens,
            batch_size=96,
            temperature=temperature,
        )
        drawn = sampler.sample([ask(problem) for problem in problems], count, seed=0)
        shares = [fmean(row) for row in rights(drawn, problems)]
        found[name] = {**bounded_mean_interval(shares)._asdict(), "by_problem": shares}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the levels that are not recorded yet; print, record."""
    parser = pretrained_parser(__doc__, problems=12, samples=4)
    parser.add_argument("--levels", type=int, nargs="+", choices=LEVELS, default=LEVELS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, tokenizer = smollm.load(options.weights, dtype=DTYPES[options.dtype])
    record, output = new_record(options, model, "base-accuracy")
    levels = json.loads(output.read_bytes())["levels"] if output.exists() else {}
    for level in options.levels:
        if str(level) not in levels:
            levels[str(level)] = measure(model, tokenizer, level, options)
        everything = {
            name: bounded_mean_interval(
                [share for found in levels.values() for share in found[name]["by_problem"]]
            )._asdict()
            for name in ("sampled", "greedy")
        }
        print(f"level {level}: {levels[str(level)]}\nso far: {everything}", flush=True)
        results.write(record | {"levels": levels, "all levels": everything}, output)


if __name__ == "__main__":
    main()
