"""Time of the advantages of 1,024 groups of 16, beside the same step in TRL and in verl.

    pytest benchmarks/bench_advantages.py --benchmark-enable --benchmark-group-by=func

All start from flat rewards on the CPU and end with one advantage per sample. Before the clock runs,
each peer must agree with the preset that is named after it.
"""

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from trl.trainer.utils import nanstd

from igrpo_algo.advantages.presets import trl_grpo_advantages, verl_grpo_advantages

PROMPTS, SIZE = 1024, 16


def rewards() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (PROMPTS * SIZE,), generator=generator).float()


def ids() -> Tensor:
    return torch.arange(PROMPTS).repeat_interleave(SIZE)


def trl(rewards: Tensor) -> Tensor:
    """TRL 1.16.0, trainer/grpo_trainer.py L2765-2810, the path of `scale_rewards="group"`."""
    mean = torch.nanmean(rewards.view(-1, SIZE), dim=1).repeat_interleave(SIZE, dim=0)
    std = nanstd(rewards.view(-1, SIZE), dim=1).repeat_interleave(SIZE, dim=0)
    return torch.nan_to_num((rewards - mean) / (std + 1e-4), nan=0.0)


def verl(rewards: Tensor, index: list[int]) -> Tensor:
    """The steps of verl 0.9.0, trainer/ppo/core_algos.py, `compute_grpo_outcome_advantage`.

    As there, groups are gathered sample by sample and each is reduced by itself; the token axis, by
    which verl multiplies at the end, is left out.
    """
    members: dict[int, list[Tensor]] = defaultdict(list)
    for group, reward in zip(index, rewards, strict=True):
        members[group].append(reward)
    moments = {}
    for group, values in members.items():
        stacked = torch.stack(values)
        moments[group] = (stacked.mean(), stacked.std())
    advantages = rewards.clone()
    for i, group in enumerate(index):
        mean, std = moments[group]
        advantages[i] = (advantages[i] - mean) / (std + 1e-6)
    return advantages


CASES: dict[str, tuple[Callable[..., Tensor], list[object], Callable[..., Tensor]]] = {
    "igrpo, blocks": (trl_grpo_advantages, [rewards(), SIZE], trl_grpo_advantages),
    "igrpo, ids": (trl_grpo_advantages, [rewards(), ids()], trl_grpo_advantages),
    "TRL": (trl, [rewards()], trl_grpo_advantages),
    "verl": (verl, [rewards(), ids().tolist()], verl_grpo_advantages),
}


@pytest.mark.parametrize(("function", "arguments", "preset"), CASES.values(), ids=CASES)
def test_advantages(
    benchmark: BenchmarkFixture,
    function: Callable[..., Tensor],
    arguments: list[object],
    preset: Callable[..., Tensor],
) -> None:
    # float32, and verl's rounding over an eps of 1e-6.
    torch.testing.assert_close(function(*arguments), preset(rewards(), SIZE), rtol=1e-5, atol=1e-5)
    rounds = 3 if function is verl else 200
    benchmark.pedantic(function, arguments, rounds=rounds, warmup_rounds=rounds // 10)
