"""TRL's book-keeping where it is not exact: runs that are resumed, and means of an evaluation."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Sampler
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from ...files import write_whole


class OrderOfEpoch(Sampler[int]):
    """TRL's sampler, in the order that it has in the epoch at hand.

    TRL's draws one permutation after the other, so a process that begins with a later epoch draws
    the first epoch's again: some prompts come twice, some never. This one draws those it missed.

    Args:
        sampler: TRL's.
        epoch: Tells how many epochs are done.
    """

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], float | None]) -> None:
        self.sampler = sampler
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            generator = self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(int(self.epoch() or 0)):
                torch.randperm(self.sampler.num_samples, generator=generator)
        return iter(self.sampler)


class ExactBookkeeping(GRPOTrainer):
    """`GRPOTrainer` whose resumed runs and evaluations are exact.

    A run that was killed and resumed trains on the prompts of the run that never stopped, in its
    order and beyond the first epoch. Where a checkpoint falls between the updates on one generated
    batch (`num_iterations`, `steps_per_generation`), it holds what is left of the batch.

    An evaluation's metrics are means over its completions, rewards over those that were scored;
    TRL averages batches, whatever their sizes.
    """

    _scored = torch.empty(0, 0)

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        return OrderOfEpoch(super()._get_train_sampler(dataset), lambda: self.state.epoch)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            save_batches(self._batch_file(output_dir), self._buffered_inputs)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        if self._batch_file(checkpoint).exists():
            self._buffered_inputs = load_batches(
                self._batch_file(checkpoint), self.accelerator.device
            )

    def _batch_file(self, folder: str) -> Path:
        return Path(folder) / f"generated_batch_{self.accelerator.process_index}.safetensors"

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        self._scored = ~rewards.isnan()
        return rewards

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch; each of its metrics counts as often as it has completions."""
        metrics = self._metrics["eval"]
        known = {name: len(values) for name, values in metrics.items()}
        result = super().prediction_step(*args, **kwargs)
        for name, values in metrics.items():
            start = known.get(name, 0)
            values[start:] = values[start:] * self._completions_behind(name)
        return result

    def _completions_behind(self, metric: str) -> int:
        """Count the completions of the last batch that a metric is a mean of."""
        if metric in ("reward", "reward_std"):
            return int(self._scored.any(1).sum())
        for column, name in enumerate(self.reward_func_names):
            if metric in (f"rewards/{name}/mean", f"rewards/{name}/std"):
                return int(self._scored[:, column].sum())
        return len(self._scored)


def save_batches(path: Path, batches: list[dict[str, Tensor]]) -> None:
    """Write micro-batches to a file, whole or not at all."""
    tensors = {
        f"{index}/{name}": value.detach().clone().contiguous()
        for index, batch in enumerate(batches)
        for name, value in batch.items()
    }
    write_whole(path, save(tensors))


def load_batches(path: Path, device: torch.device) -> list[dict[str, Tensor]]:
    """Read what `save_batches` wrote."""
    batches: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(path).items():
        index, _, name = key.partition("/")
        batches.setdefault(int(index), {})[name] = value.to(device)
    return [batches[index] for index in range(len(batches))]
