"""What a pretrained model can do before any training: its accuracy on the word problems, by level.

    python -m benchmarks.replication.base FOLDER      # SmolLM2 in FOLDER; one thread, minutes

A task needs headroom: what nobody gets right, or everybody, teaches nothing.
"""

import argparse
import random
import time
from collections.abc import Sequence
from statistics import fmean

import torch

from benchmarks import results
from benchmarks.cases import DTYPES
from benchmarks.replication import smollm
from benchmarks.replication.tasks.words import LEVELS, ask, draw, make_task
from benchmarks.replication.templates import add_options, new_record, rights
from igrpo_algo.cli.intervals import bounded_mean_interval
from igrpo_algo.engines.static import StaticSampler


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure level by level; print, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_options(parser)
    parser.add_argument("--problems", type=int, default=12, help="of each level")
    parser.add_argument("--samples", type=int, default=4, help="of each problem")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, tokenizer = smollm.load(options.weights, dtype=DTYPES[options.dtype])
    record, output = new_record(options, model, "base-accuracy")
    rng = random.Random(options.seed)
    all_shares: dict[str, list[float]] = {"sampled": [], "greedy": []}
    for level in LEVELS:
        problems = [draw(rng, (level,)) for _ in range(options.problems)]
        found = {}
        for name, shares in all_shares.items():
            start, greedy = time.perf_counter(), name == "greedy"
            sampler = StaticSampler(
                model,
                tokenizer,
                max_new_tokens=make_task((level,)).answer_tokens,
                batch_size=96,
                temperature=0.0 if greedy else 1.0,
            )
            count = 1 if greedy else options.samples
            drawn = sampler.sample([ask(problem) for problem in problems], count, seed=0)
            right = [fmean(row) for row in rights(drawn, problems)]
            shares += right
            found[name] = bounded_mean_interval(right)._asdict()
            print(f"{level=} {name}: {found[name]} ({time.perf_counter() - start:.0f} s)")
        record[f"words-{level}"] = found
        results.write(record, output)
    record["words"] = {
        name: bounded_mean_interval(shares)._asdict() for name, shares in all_shares.items()
    }
    print(f"all levels: {record['words']}")
    results.write(record, output)


if __name__ == "__main__":
    main()
