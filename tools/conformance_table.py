"""Write docs/use/conformance.md from what the tests of the hosts recorded in conformance.json."""

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs" / "use"
HEAD = """# Losses beside each trainer's own

`make conformance` builds an environment for each trainer (their requirements don't meet), runs this
package inside it, and gives the same batches to the trainer's loss and to ours. `RECORD=1 make
conformance` writes this page.

| trainer | version | compared | largest difference |
|---|---|---|---|
"""
TAIL = """
TRL 1.16.0 is compared in `make test`. Every row was run on a CPU, slime's from a clone of
its source (`SLIME_SOURCE`). Unsloth has no row: a step there is trained by its own loss.

## Left out

What verl's losses and estimators have and ours lack, and why:

- `dro`: it is `Reinforce()` with `kl=K2()`, the log-probs as sampled as its reference and `kl_coef`
  as its beta, as `tests/hosts/verl` checks. With a correction for the sampler it differs: verl
  weighs the penalty too, here the weights belong to the surrogate alone.
- `remax` with a given baseline: a subtraction. Pass `rewards - baseline` as advantages. Its greedy
  completion would be one more sample of each prompt, which no stage of iGRPO draws.
- `optimal_token_baseline`, and its form over turns: a baseline for every token, weighed by the sum
  of squared probabilities over the vocabulary at each token. No log-prob op here returns that sum,
  and the advantages here are of samples. `opo` is the same idea for a whole sample.
"""


def make_table(record: dict[str, dict]) -> str:
    """Make the page."""
    rows = (
        f"| {host} | {entry['version']} | {what} | {difference:.1e} |\n"
        for host, entry in sorted(record.items())
        for what, difference in sorted(entry["differences"].items())
    )
    return HEAD + "".join(rows) + TAIL


if __name__ == "__main__":
    record = json.loads((DOCS / "conformance.json").read_text())
    (DOCS / "conformance.md").write_text(make_table(record))
