"""The demo's arms, settings and runs, and where each run keeps its files. No torch here."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..metrics_file import MetricsFile


@dataclass(frozen=True)
class Arm:
    """One way of spending eight completions per prompt.

    Attributes:
        label: Its name in tables and plots.
        num_drafts: Completions of Stage 1; 0 is GRPO.
        num_refinements: Completions under the prompt that is trained on.
        draft_choice: Which draft is refined, as `IGRPOConfig` has it.
        draft_loss_coef: Weight of the drafts' own loss.
    """

    label: str
    num_drafts: int
    num_refinements: int
    draft_choice: str = "best"
    draft_loss_coef: float = 0.0

    @property
    def completions(self) -> int:
        """Completions per prompt, drafts included."""
        return self.num_drafts + self.num_refinements


ARMS = {
    "grpo": Arm("GRPO", 0, 8),
    "igrpo": Arm("iGRPO of the paper", 4, 4),
    "both-worst": Arm("iGRPO on both stages with the worst draft", 4, 4, "worst", 1.0),
    "both-best": Arm("iGRPO on both stages with the best draft", 4, 4, "best", 1.0),
    "random": Arm("iGRPO, random draft", 4, 4, "random"),
}
DEFAULT_ARMS = ("grpo", "igrpo", "both-worst")


@dataclass(frozen=True)
class DemoConfig:
    """Settings that all arms share.

    Attributes:
        steps: Updates, each on fresh samples.
        prompts_per_step: Different problems per update.
        learning_rate: Of AdamW; constant after `warmup_steps`.
        evaluations: Held-out evaluations during training, besides the one before it.
        held_out: Problems that no training sees.
        final_samples: Answers per held-out problem in the evaluation at the end, each refined.
        warm_up: Whether the warmed weights are remade, in place of the shipped ones.
    """

    steps: int = 100
    prompts_per_step: int = 64
    learning_rate: float = 3e-4
    warmup_steps: int = 5
    evaluations: int = 8
    held_out: int = 1000
    final_samples: int = 4
    warm_up: bool = False

    @property
    def evaluation_steps(self) -> list[int]:
        """Steps after which the held-out problems are answered; the last step is one."""
        return sorted(
            {round(self.steps * i / self.evaluations) for i in range(1, self.evaluations + 1)} - {0}
        )

    @property
    def checkpoint_steps(self) -> int:
        """Steps between checkpoints."""
        return max(1, self.steps // 5)

    @property
    def logging_steps(self) -> int:
        """Steps that one row of the metrics file averages over."""
        return max(1, self.steps // 50)


@dataclass(frozen=True)
class Run:
    """One arm with one seed, kept in a folder of its own.

    Examples:
        >>> Run.parse("both-worst-2")
        Run(arm='both-worst', seed=2)
    """

    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Folder name and command-line spelling."""
        return f"{self.arm}-{self.seed}"

    @classmethod
    def parse(cls, name: str) -> "Run":
        """Read a run's name back."""
        arm, _, seed = name.rpartition("-")
        if arm not in ARMS:
            raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm!r}")
        return cls(arm, int(seed))

    def folder(self, output_dir: Path) -> Path:
        """Where the run keeps its checkpoints, metrics and result."""
        return output_dir / "runs" / self.name

    def metrics(self, output_dir: Path) -> MetricsFile:
        """The run's metrics, one row per held-out evaluation and per logging interval."""
        return MetricsFile(self.folder(output_dir) / "metrics.jsonl")

    def result(self, output_dir: Path) -> dict[str, Any] | None:
        """What the run found, or None while it is not finished."""
        path = self.folder(output_dir) / "result.json"
        return json.loads(path.read_bytes()) if path.exists() else None


def share_runs(runs: Sequence[Run], workers: int) -> list[list[Run]]:
    """Deal runs to workers in turn, so that each gets its part of every arm.

    Examples:
        >>> runs = [Run(arm, seed) for seed in range(2) for arm in ("grpo", "igrpo")]
        >>> [[run.name for run in share] for share in share_runs(runs, 2)]
        [['grpo-0', 'igrpo-1'], ['igrpo-0', 'grpo-1']]
    """
    shares: list[list[Run]] = [[] for _ in range(workers)]
    for index, run in enumerate(runs):
        row, column = divmod(index, workers)
        shares[(column + row) % workers].append(run)
    return [share for share in shares if share]
