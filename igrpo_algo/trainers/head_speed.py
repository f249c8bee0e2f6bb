"""Whose op is faster on a device for log-probs from hidden states, ours or TRL's: the records."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

LEVEL = 0.97
"""A share of TRL's time above this is within the noise of a run, and TRL's own op stays."""


@dataclass(frozen=True)
class Measured:
    """Our time over TRL's in one recorded run.

    Attributes:
        capability: Of the GPU, such as (9, 0); None for CPUs.
        share: `linear_token_logprobs`, forward and backward, over TRL's op: the largest share of
            all sizes measured.
        record: The run, under benchmarks/results/.
        commit: Of the sources that were measured.
    """

    capability: tuple[int, int] | None
    share: float
    record: str
    commit: str


MEASURED = (
    Measured(None, 0.58, "2026-11-25-0057-amd-epyc.json", "db927110a7"),
    Measured((9, 0), 0.99, "2026-11-26-h100.json", "35facc09ea"),
)


class FasterHead(NamedTuple):
    """The choice, "igrpo" or "trl", and what it rests on."""

    choice: str
    reason: str


def faster_head(device: torch.device) -> FasterHead:
    """Say whose op `fused_head="auto"` takes on a device: ours where a record has it faster.

    GPUs are told apart by their capability; where none of a device's kind was measured, TRL's own
    op stays.

    Examples:
        >>> faster_head(torch.device("cpu")).choice
        'igrpo'
    """
    capability = None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
    elif device.type != "cpu":
        return FasterHead("trl", f"nothing was measured on {device.type}")
    for run in MEASURED:
        if run.capability == capability:
            choice = "igrpo" if run.share <= LEVEL else "trl"
            source = f"benchmarks/results/{run.record}, commit {run.commit}"
            return FasterHead(choice, f"ours took {run.share:.2f} of TRL's time ({source})")
    return FasterHead("trl", f"nothing was measured on capability {capability}")
