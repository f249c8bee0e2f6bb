"""What an op costs the host: tiny tensors on one CPU thread, beside plain torch's lines.

    python -m benchmarks.host_cost

Forward and backward take turns, since the machine's clock moves; medians of their processor time.
`exact in torch ops` is the algebra of `token_logprobs` as differentiable torch ops, without a check
of its arguments: what a log-prob that keeps the digits of confident tokens costs at the least.
"""

import statistics
import time
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks import batches, peers_linear
from benchmarks.batches import Batch
from benchmarks.cases import BOTH, Case
from igrpo_kernels import token_logprobs

Runs: TypeAlias = dict[str, Callable[[Batch], Tensor]]
TURNS, STEPS = 200, 10
CPU = torch.device("cpu")


def ours(batch: Batch) -> Tensor:
    return token_logprobs(batch.logits, batch.targets)


def plain(batch: Batch) -> Tensor:
    return batch.logits.float().log_softmax(-1).gather(-1, batch.targets[..., None]).squeeze(-1)


def exact(batch: Batch) -> Tensor:
    """-log1p(others), with others = sum_{j != t} exp(z_j - z_t), by its logarithm."""
    at = batch.targets[..., None]
    shifted = batch.logits - batch.logits.gather(-1, at)
    others = shifted.scatter(-1, at, -torch.inf).logsumexp(-1)
    return torch.nn.functional.logsigmoid(-others)


def microseconds(runs: Runs, batch: Batch) -> dict[str, float]:
    """Median processor time of a forward and backward of each."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            began = time.process_time()
            for _ in range(STEPS):
                batch.clear()
                run(batch).sum().backward()
            found[name].append((time.process_time() - began) / STEPS)
    return {name: 1e6 * statistics.median(times) for name, times in found.items()}


def main() -> None:
    """Print the time of each, and its ratio to plain torch's."""
    torch.set_num_threads(1)
    size = Case("", BOTH, "fp32", tokens=8, vocabulary=16, width=8)
    linear, logits = batches.make_linear(size, 0, CPU), batches.make_logits(size, 0, CPU)
    of_loss: Runs = {"igrpo": peers_linear.igrpo_loss, "torch": peers_linear.torch_loss}
    of_hidden: Runs = {"igrpo": peers_linear.igrpo_logprobs, "torch": peers_linear.torch_logprobs}
    of_logits: Runs = {"igrpo": ours, "torch": plain, "exact in torch ops": exact}
    for op, runs, batch in (
        ("linear_policy_loss", of_loss, linear),
        ("linear_token_logprobs", of_hidden, linear),
        ("token_logprobs", of_logits, logits),
    ):
        found = microseconds(runs, batch)
        for name, time_of in found.items():
            print(f"{op}: {name} {time_of:.0f} us, {time_of / found['torch']:.2f} of plain torch")


if __name__ == "__main__":
    main()
