"""How fast the trainer's ops on the head are compared with TRL's, by device, from the records."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measured:
    """Our time over TRL's in one recorded run, least and greatest of all sizes measured.

    Attributes:
        capability: Of the GPU, such as (9, 0); None for CPUs.
        loss: `linear_policy_loss`, forward and backward.
        scores: `linear_token_logprobs`, forward: log-probs of samples and of the reference.
        record: The run, under benchmarks/results/.
        commit: Of the sources that were measured.
    """

    capability: tuple[int, int] | None
    loss: tuple[float, float]
    scores: tuple[float, float]
    record: str
    commit: str

    def __str__(self) -> str:
        loss, scores = (f"{least:.2f} to {most:.2f}" for least, most in (self.loss, self.scores))
        return (
            f"the loss took {loss} of TRL's time, log-probs alone {scores} "
            f"(benchmarks/results/{self.record}, commit {self.commit})"
        )


MEASURED = (
    Measured(None, (0.19, 0.52), (0.66, 1.09), "2026-11-25-0057-amd-epyc.json", "db927110a7"),
    Measured((9, 0), (0.43, 1.01), (1.06, 1.08), "2026-11-26-h100.json", "35facc09ea"),
)


def head_speed(device: torch.device) -> str:
    """Say how the trainer's head did beside TRL's on a device of this kind.

    The trainer takes its own on every device, and TRL's loss with `use_trl_loss=True`. GPUs are
    distinguished by their capability.

    Examples:
        >>> head_speed(torch.device("mps"))
        'not yet measured on mps'
    """
    if device.type not in ("cpu", "cuda"):
        return f"not yet measured on {device.type}"
    capability = None if device.type == "cpu" else torch.cuda.get_device_capability(device)
    for run in MEASURED:
        if run.capability == capability:
            return str(run)
    return f"not yet measured on capability {capability}"
