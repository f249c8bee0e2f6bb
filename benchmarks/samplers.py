"""`StaticSampler` beside `TransformersSampler`: tokens a second, by default of random weights.

    python -m benchmarks.samplers                  # minutes, one thread; --device cuda; --weights

The samplers take turns over the same prompts and seeds; each draws other tokens, so what counts is
the time per token drawn. A share of the vocabulary ends a completion (`--stop-share`): with 0, all
are drawn to their limit.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks import results
from benchmarks.cases import DTYPES
from benchmarks.models import random_qwen3
from benchmarks.options import add_device, add_dtype, parser_of
from benchmarks.shared_prompt import quartiles
from igrpo_algo.engines.static import StaticSampler
from igrpo_algo.engines.transformers import TransformersSampler

SAMPLERS = {"static": StaticSampler, "transformers": TransformersSampler}


class Numbers:
    """A tokenizer for prompts of token ids: their text is never looked at."""

    eos_token_id = None
    pad_token_id = 0
    chat_template = None

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Name the tokens by their ids."""
        return list(map(str, ids))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Give the ids as text."""
        return " ".join(map(str, ids))


def measure(model: Any, options: argparse.Namespace, stop_share: float) -> dict[str, Any]:
    """Tokens a second of each sampler in each round, and of how many tokens."""
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = (options.prompts, options.prompt_tokens)
    prompts = torch.randint(vocabulary, shape, generator=generator).tolist()
    samplers = {
        name: kind(
            model,
            Numbers(),
            max_new_tokens=options.new_tokens,
            batch_size=options.prompts * options.completions,
            stop_token_ids=range(int(stop_share * vocabulary)),
        )
        for name, kind in SAMPLERS.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    tokens: dict[str, list[int]] = {name: [] for name in SAMPLERS}
    for seed in range(options.rounds + 1):  # the first one warms up
        for name, sampler in samplers.items():
            start = time.perf_counter()
            groups = sampler.sample(prompts, options.completions, seed=seed)
            seconds = time.perf_counter() - start
            if seed:
                drawn = sum(len(each.token_ids) for group in groups for each in group)
                rates[name].append(drawn / seconds)
                tokens[name].append(drawn)
    ratios = [one / two for one, two in zip(rates["static"], rates["transformers"], strict=True)]
    return {
        "stop_share": stop_share,
        "tokens": tokens,
        "tokens_per_second": {name: quartiles(values) for name, values in rates.items()},
        "static_over_transformers": quartiles(ratios),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure with and without completions that end early; print and record."""
    parser = parser_of(
        __doc__, prompts=8, completions=8, prompt_tokens=256, new_tokens=64, rounds=5, width=512,
        layers=12, vocabulary=32768, threads=1,
    )  # fmt: skip
    add_device(parser)
    add_dtype(parser)
    parser.add_argument("--stop-share", type=float, nargs="+", default=[0.0, 0.03])
    parser.add_argument("--weights", type=Path, help="the folder of a model to take instead")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.weights:
        dtype = DTYPES[options.dtype]
        model = AutoModelForCausalLM.from_pretrained(options.weights, dtype=dtype).to(device)
    else:
        model = random_qwen3(
            width=options.width,
            layers=options.layers,
            vocabulary=options.vocabulary,
            positions=options.prompt_tokens + options.new_tokens,
            device=options.device,
            dtype=DTYPES[options.dtype],
        )
    given = vars(options) | {"weights": options.weights and options.weights.name}
    record = results.about(device, "igrpo_algo")
    record["options"] = {name: value for name, value in given.items() if name != "output"}
    record["rows"] = []
    name = f"{record['date']}-samplers-{options.device}.json"
    output = options.output or results.RESULTS / name
    for share in options.stop_share:
        row = measure(model, options, share)
        record["rows"].append(row)
        rates = row["tokens_per_second"]
        print(
            f"stop share {share}: "
            + ", ".join(f"{name} {rate['median']:.0f} tokens/s" for name, rate in rates.items())
            + f", ratio {row['static_over_transformers']}"
        )
        results.write(record, output)


if __name__ == "__main__":
    main()
