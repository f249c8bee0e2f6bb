"""The callback that writes `metrics.jsonl` while TRL's trainer runs."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .metrics_file import MetricsFile


class Recorder(TrainerCallback):
    """Appends one line per log of the trainer: its step, and what was logged.

    The closing line is left out: after a resume, the trainer divides the loss of the steps since
    then by all of them.
    """

    def __init__(self, metrics: MetricsFile) -> None:
        self.metrics = metrics

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **objects: Any,
    ) -> None:
        """Write a line, on the first process only."""
        if logs and "train_runtime" not in logs and state.is_world_process_zero:
            self.metrics.append({"step": state.global_step, **logs})
