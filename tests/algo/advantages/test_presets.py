"""Presets against the trainers that they are named after.

TRL's own lines are cut out of the installed package and run. The other trainers are not installed:
their rules are written down here anew, as loops over plain Python floats, from the commits that
`advantage_presets.py` names.
"""

import ast
import importlib.util
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from igrpo_algo.advantages import presets
from igrpo_algo.advantages.of_groups import sum_rewards

NAN = float("nan")
# The promise of the module; TRL computes in float32, the loops in float64.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
SIZES = (4, 1, 6, 2, 3)


def trl_source(module: str) -> ast.Module:
    spec = importlib.util.find_spec("trl")
    assert spec
    assert spec.origin
    return ast.parse((Path(spec.origin).parent / module).read_text())


def trl_nanstd() -> Callable[..., Tensor]:
    tree = trl_source("trainer/utils.py")
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "nanstd")
    namespace: dict[str, object] = {"torch": torch}
    exec(compile(ast.Module([function], []), "trl/trainer/utils.py", "exec"), namespace)
    return namespace["nanstd"]


def trl_lines(module: str, first: str) -> ast.Module:
    """Cut out of a trainer the statements from `first` to the one that zeroes NaN advantages."""
    (body,) = (
        node.body
        for node in ast.walk(trl_source(module))
        if isinstance(node, ast.FunctionDef) and node.name == "_generate_and_score_completions"
    )
    texts = [ast.unparse(statement) for statement in body]
    start = next(i for i, text in enumerate(texts) if text.startswith(first))
    end = texts.index("advantages = torch.nan_to_num(advantages, nan=0.0)")
    return ast.Module(body[start : end + 1], [])


def run_trl(
    module: str, rewards: Tensor, size: int, weights: list[float] | None = None, **options: object
) -> Tensor:
    """Run TRL's lines from the rewards of each function, [B, K], to the advantages, [B]."""
    kinds = rewards.shape[1]
    trainer = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards="group",
        reward_weights=torch.tensor(weights or [1.0] * kinds),
        reward_funcs=[None] * kinds,
        reward_clip_range=None,
        beta=0.0,
        normalize_advantages=False,
    )
    vars(trainer).update(options)
    names = {
        "self": trainer,
        "torch": torch,
        "nanstd": trl_nanstd(),
        "device": torch.device("cpu"),
        "rewards_per_func": rewards,
        "unscorable_mask": rewards.isnan().all(1),
        "num_generations": size,
    }
    first = "if self.multi_objective" if "grpo" in module else "rewards = (rewards_per_func"
    exec(compile(trl_lines(module, first), module, "exec"), names)
    return names["advantages"]


GRPO, RLOO = "trainer/grpo_trainer.py", "trainer/rloo_trainer.py"


def trl_rewards(kinds: int) -> Tensor:
    """Five groups of four: binary, continuous, with unscored rewards, a lone one, equal ones."""
    rewards = torch.rand(20, kinds)
    rewards[:8] = (rewards[:8] > 0.6).float()
    rewards[9] = NAN
    rewards[13:16] = NAN
    rewards[16:] = 0.5
    return rewards


@pytest.mark.parametrize(
    ("preset", "scale"),
    [
        (presets.trl_grpo_advantages, "group"),
        (presets.trl_batch_scaled_advantages, "batch"),
        (presets.trl_unscaled_advantages, "none"),
    ],
)
def test_trl_scales(preset: Callable[..., Tensor], scale: str) -> None:
    rewards = trl_rewards(2)
    rewards[2, 1] = NAN
    weights = [1.0, 0.3]
    wanted = run_trl(GRPO, rewards, 4, weights, scale_rewards=scale)
    total = sum_rewards(rewards, weights)
    torch.testing.assert_close(preset(total, 4), wanted, **CLOSE)
    torch.testing.assert_close(preset(total.reshape(5, 4)).flatten(), wanted, **CLOSE)
    lone = run_trl(GRPO, rewards[:1], 1, weights, scale_rewards=scale)
    torch.testing.assert_close(preset(total[:1], 1), lone, **CLOSE)


def test_trl_normalize_then_sum() -> None:
    rewards = trl_rewards(3)
    rewards[2, 1] = NAN
    rewards[17, 2] = 0.9
    weights = [1.0, 0.3, 2.0]
    options = {"multi_objective_aggregation": "normalize_then_sum"}
    wanted = run_trl(GRPO, rewards, 4, weights, **options)
    actual = presets.trl_normalize_then_sum_advantages(rewards, 4, weights)
    torch.testing.assert_close(actual, wanted, **CLOSE)
    # The whitened zero of the equal group is not zero; that of the unscored samples is.
    assert (actual[[9, 13, 14, 15]] == 0).all()
    assert (actual[16] != 0).all()
    equal_weights = run_trl(GRPO, rewards, 4, **options)
    actual = presets.trl_normalize_then_sum_advantages(rewards, 4)
    torch.testing.assert_close(actual, equal_weights, **CLOSE)


def test_trl_rloo() -> None:
    rewards = trl_rewards(1)
    actual = presets.trl_rloo_advantages(rewards[:, 0], 4)
    torch.testing.assert_close(actual, run_trl(RLOO, rewards, 4), **CLOSE)


def test_trl_lines_are_the_ones_that_ship() -> None:
    """The cut spans the whole computation: the last name is there and the modes differ."""
    rewards = trl_rewards(1)
    modes = [run_trl(GRPO, rewards, 4, scale_rewards=each) for each in ("group", "batch", "none")]
    assert not torch.allclose(modes[0], modes[1])
    assert not torch.allclose(modes[1], modes[2])


# The other trainers, in plain Python: `groups` are lists of rewards.


def grouped_samples() -> tuple[list[list[float]], Tensor, Tensor]:
    """Groups of different sizes, one of a single reward, shuffled over a flat batch."""
    groups = [torch.rand(size, dtype=torch.float64).tolist() for size in SIZES]
    groups[0] = [1.0, 0.0, 0.0, 0.0]
    return groups, torch.tensor([r for g in groups for r in g]).double(), group_ids()


def group_ids() -> Tensor:
    return torch.tensor([9 - 2 * i for i, size in enumerate(SIZES) for _ in range(size)])


def flat(per_group: list[list[float]]) -> Tensor:
    return torch.tensor([value for group in per_group for value in group], dtype=torch.float64)


def lone_kept(group: list[float], advantages: Callable[[], list[float]]) -> list[float]:
    return group if len(group) == 1 else advantages()


def verl_grpo(group: list[float]) -> list[float]:
    mean, std = (statistics.fmean(group), statistics.stdev(group)) if len(group) > 1 else (0.0, 1.0)
    return [(r - mean) / (std + 1e-6) for r in group]


def less_mean(group: list[float]) -> list[float]:
    return [r - statistics.fmean(group) for r in group]


def rloo(group: list[float]) -> list[float]:
    n = len(group)
    return [r * n / (n - 1) - statistics.fmean(group) * n / (n - 1) for r in group]


def nemo_grpo(group: list[float]) -> list[float]:
    result = []
    for i, reward in enumerate(group):
        others = group[:i] + group[i + 1 :]
        value = reward - statistics.fmean(others) if others else 0.0
        std = statistics.stdev(others) if len(others) > 1 else 0.0
        result.append(value / (std + 1e-6) if std > 0 else value)
    return result


def passk(group: list[float]) -> list[float]:
    if len(group) == 1:
        return [0.0]
    first, second = sorted(group, reverse=True)[:2]
    value = (first - second) / (statistics.stdev(group) + 1e-6)
    return [value if r == first else 0.0 for r in group]


def group_norm(group: list[float]) -> list[float]:
    std = statistics.stdev(group) if len(group) > 1 else 1.0
    return [r / (std + 1e-9) for r in less_mean(group)]


def maxrl(group: list[float]) -> list[float]:
    return [r / (statistics.fmean(group) + 1e-6) for r in less_mean(group)]


@pytest.mark.parametrize(
    ("preset", "rule"),
    [
        (presets.verl_grpo_advantages, verl_grpo),
        (presets.verl_dr_grpo_advantages, lambda g: lone_kept(g, lambda: less_mean(g))),
        (presets.verl_rloo_advantages, lambda g: lone_kept(g, lambda: rloo(g))),
        (presets.verl_grpo_passk_advantages, passk),
        (presets.openrlhf_group_norm_advantages, group_norm),
        (presets.openrlhf_dr_grpo_advantages, less_mean),
        (presets.openrlhf_rloo_advantages, lambda g: rloo(g) if len(g) > 1 else [0.0]),
        (presets.nemo_rl_grpo_advantages, nemo_grpo),
        (presets.skyrl_maxrl_advantages, lambda g: lone_kept(g, lambda: maxrl(g))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_rules_of_one_group(
    preset: Callable[..., Tensor], rule: Callable[[list[float]], list[float]]
) -> None:
    groups, rewards, ids = grouped_samples()
    wanted = flat([rule(group) for group in groups])
    torch.testing.assert_close(preset(rewards, ids), wanted, **CLOSE)
    order = torch.randperm(len(rewards))
    torch.testing.assert_close(preset(rewards[order], ids[order]), wanted[order], **CLOSE)


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        (presets.trl_grpo_advantages, [1.4997, -0.4999]),
        (presets.verl_grpo_advantages, [1.5, -0.5]),
        (presets.openrlhf_group_norm_advantages, [1.5, -0.5]),
        (presets.nemo_rl_grpo_advantages, [1.0, -0.57735]),
        (presets.verl_rloo_advantages, [1.0, -1 / 3]),
        (presets.verl_grpo_passk_advantages, [2.0, 0.0]),
        (presets.verl_gpg_advantages, [3.0, -1.0]),
        (presets.skyrl_maxrl_advantages, [3.0, -1.0]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_worked_numbers(preset: Callable[..., Tensor], wanted: list[float]) -> None:
    first, rest = wanted
    actual = preset(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    # The numbers above are rounded to four digits.
    torch.testing.assert_close(actual, torch.tensor([[first, rest, rest, rest]]), rtol=0, atol=2e-5)


def test_verl_opo() -> None:
    groups, rewards, ids = grouped_samples()
    lengths = torch.randint(1, 50, rewards.shape)
    wanted, position = [], 0
    for group in groups:
        weights = lengths[position : position + len(group)].tolist()
        position += len(group)
        baseline = sum(map(math.prod, zip(group, weights, strict=True))) / sum(weights)
        wanted.append([r - (baseline if len(group) > 1 else 0) for r in group])
    actual = presets.verl_opo_advantages(rewards, lengths, ids)
    torch.testing.assert_close(actual, flat(wanted), **CLOSE)


def test_verl_gpg() -> None:
    groups, rewards, ids = grouped_samples()
    factor = len(rewards) / (len(rewards) - 3)
    wanted = flat([lone_kept(group, lambda g=group: less_mean(g)) for group in groups]) * factor
    torch.testing.assert_close(presets.verl_gpg_advantages(rewards, ids), wanted, **CLOSE)
    assert torch.equal(presets.verl_gpg_advantages(torch.zeros(1, 4)), torch.zeros(1, 4))


def over_tokens(values: Tensor, lengths: Tensor, ddof: int) -> tuple[float, float]:
    tokens = [v for v, n in zip(values.tolist(), lengths.tolist(), strict=True) for _ in range(n)]
    mean = statistics.fmean(tokens)
    return mean, sum((t - mean) ** 2 for t in tokens) / (len(tokens) - ddof)


# A factor of 1e-4 brings the variance down to where 1e-8 shows.
each_scale = pytest.mark.parametrize("scale", [1.0, 1e-4])


@each_scale
def test_verl_whitens_over_tokens(scale: float) -> None:
    groups, rewards, ids = grouped_samples()
    lengths = torch.randint(1, 9, rewards.shape)
    kept = flat([lone_kept(group, lambda g=group: less_mean(g)) for group in groups])
    for inner, actual in [
        (kept, presets.verl_reinforce_plus_plus_baseline_advantages(rewards * scale, lengths, ids)),
        (rewards, presets.verl_reinforce_plus_plus_advantages(rewards * scale, lengths)),
    ]:
        mean, variance = over_tokens(inner * scale, lengths, ddof=1)
        wanted = (inner * scale - mean) / math.sqrt(variance + 1e-8)
        torch.testing.assert_close(actual, wanted, **CLOSE)


@each_scale
def test_openrlhf_and_nemo_rl_whiten_over_tokens(scale: float) -> None:
    groups, rewards, ids = grouped_samples()
    lengths = torch.randint(1, 9, rewards.shape)
    inner = flat([less_mean(group) for group in groups]) * scale
    mean, variance = over_tokens(inner, lengths, ddof=0)
    wanted = (inner - mean) / math.sqrt(max(variance, 1e-8))
    for preset in (
        presets.openrlhf_reinforce_baseline_advantages,
        presets.nemo_rl_reinforce_plus_plus_advantages,
    ):
        torch.testing.assert_close(preset(rewards * scale, lengths, ids), wanted, **CLOSE)


@pytest.mark.parametrize("weights", [None, [1.0, 0.25]])
def test_gdpo(weights: list[float] | None) -> None:
    groups, first, ids = grouped_samples()
    second = torch.rand_like(first) * 10
    lengths = torch.randint(1, 9, first.shape)
    both = torch.stack([first, second], -1)
    cut = [group.tolist() for group in second.split(SIZES)]
    w = weights or [1.0, 1.0]

    total = sum(w[k] * flat([verl_grpo(g) for g in kind]) for k, kind in enumerate([groups, cut]))
    mean, variance = over_tokens(total, lengths, ddof=1)
    wanted = (total - mean) / math.sqrt(variance + 1e-8)
    actual = presets.verl_gdpo_advantages(both, lengths, ids, weights)
    torch.testing.assert_close(actual, wanted, **CLOSE)

    total = sum(w[k] * flat([nemo_grpo(g) for g in kind]) for k, kind in enumerate([groups, cut]))
    wanted = (total - total.mean()) / total.std()
    actual = presets.nemo_rl_gdpo_advantages(both, ids, weights)
    torch.testing.assert_close(actual, wanted, **CLOSE)


def test_unscored_samples_are_left_out_of_every_preset() -> None:
    rewards = torch.tensor([1.0, 0.0, NAN, 0.5, 0.25, NAN])
    ids, lengths = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([3, 1, 50, 2, 2, 50])
    known = ~rewards.isnan()
    names = [name for name in dir(presets) if name.endswith("_advantages")]
    assert len(names) == 22
    for name in names:
        preset = getattr(presets, name)
        several = "gdpo" in name or "then_sum" in name
        values = torch.stack([rewards, rewards], -1) if several else rewards
        code = preset.__code__
        takes = code.co_varnames[: code.co_argcount]
        extra = {
            key: value for key, value in {"lengths": lengths, "groups": ids}.items() if key in takes
        }
        kept = {key: value[known] for key, value in extra.items()}
        actual = preset(values, **extra)
        assert (actual[~known] == 0).all(), name
        torch.testing.assert_close(actual[known], preset(values[known], **kept), **CLOSE)
        assert actual.abs().sum() > 0


def test_lengths_must_fit() -> None:
    with pytest.raises(ValueError, match=r"lengths must have shape of rewards = \[2, 2\], got"):
        presets.openrlhf_reinforce_baseline_advantages(torch.ones(2, 2), torch.ones(2))
