"""Write docs/use/conformance.md from tests/hosts/*/differences.json, which their tests recorded."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "use" / "conformance.md"
HEAD = """# Losses beside each trainer's own

`make conformance` builds an environment for each trainer (their requirements conflict), runs this
package inside it, and gives the same batches to the trainer's loss and to ours. `RECORD=1 make
conformance` writes this page; with `HOSTS=verl`, the rows of that trainer only.

| trainer | version | compared | largest difference | what ran |
|---|---|---|---|---|
"""
TAIL = """
`make test` compares with TRL 1.16.0. Every row was run on a CPU, slime's from a clone of its source
(`SLIME_SOURCE`). Unsloth has no row, because training there uses Unsloth's own loss. On a CPU, with
its grouping of prompts and its packing off, its gradient was within 7e-5 of ours; it leaves out pad
tokens that the model sampled in the middle of an answer, which count here.

## Left out

Losses and estimators of verl that this library does not have, and why:

- `dro` is `Reinforce()` with `kl=K2()`, the log-probs of the sampling policy as the reference and
  `kl_coef` as its beta; `tests/hosts/verl` checks this. With a correction for the sampler it
  differs: verl weights the penalty too, here the weights apply to the surrogate alone.
- `remax` with a given baseline is a subtraction: pass `rewards - baseline` as advantages. Its
  greedy completion would be one more sample per prompt, which no stage of iGRPO draws.
- `optimal_token_baseline`, and its form over turns, needs a baseline for every token, weighted by
  the sum of squared probabilities over the vocabulary. No log-prob op here returns that sum, and
  advantages here belong to samples. `opo` is the same idea for a whole sample.
"""


def make_table(records: Iterable[dict[str, Any]]) -> str:
    """Make the page."""
    rows = (
        "| {trainer} | {version} | {what} | {difference:.1e} | {how} |\n".format(
            **record, what=what, difference=difference
        )
        for record in sorted(records, key=lambda record: record["trainer"])
        for what, difference in sorted(record["differences"].items())
    )
    return HEAD + "".join(rows) + TAIL


def read_records() -> list[dict[str, Any]]:
    """Read what was recorded last, host by host."""
    files = (ROOT / "tests" / "hosts").glob("*/differences.json")
    return [json.loads(file.read_text()) for file in files]


if __name__ == "__main__":
    PAGE.write_text(make_table(read_records()))
