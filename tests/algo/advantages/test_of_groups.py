"""Advantages against loops in plain Python floats, one per formula, in every layout."""

import math
import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from igrpo_algo.advantages.baselines import (
    best_over_runner_up,
    maxrl,
    rloo,
    standardize_leave_one_out,
)
from igrpo_algo.advantages.moments import GroupedRewards
from igrpo_algo.advantages.of_groups import (
    center_by_group,
    center_by_group_scale_by_batch,
    gdpo,
    standardize_by_group,
    std_by_group,
    sum_rewards,
    whiten,
)

NAN = float("nan")
# float64 throughout: what is left is the order of the additions.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

Reference = Callable[[list[float]], list[float]]
Advantage = Callable[..., Tensor]


def deviation(rewards: list[float], ddof: int) -> float:
    mean = statistics.fmean(rewards)
    return math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - ddof))


def is_flat(rewards: list[float]) -> bool:
    return len(set(rewards)) <= 1


def centered(rewards: list[float]) -> list[float]:
    if is_flat(rewards):
        return [0.0] * len(rewards)
    return [r - statistics.fmean(rewards) for r in rewards]


def standardized(rewards: list[float], *, ddof: int, eps: float) -> list[float]:
    if is_flat(rewards):
        return [0.0] * len(rewards)
    return [r / (deviation(rewards, ddof) + eps) for r in centered(rewards)]


def deviations(rewards: list[float], *, ddof: int) -> list[float]:
    return [0.0 if is_flat(rewards) else deviation(rewards, ddof)] * len(rewards)


def over_others(rewards: list[float]) -> list[float]:
    if is_flat(rewards):
        return [0.0] * len(rewards)
    others = [rewards[:i] + rewards[i + 1 :] for i in range(len(rewards))]
    return [r - statistics.fmean(rest) for r, rest in zip(rewards, others, strict=True)]


def over_others_standardized(rewards: list[float], *, ddof: int, eps: float) -> list[float]:
    result = over_others(rewards)
    for i in range(len(rewards)):
        others = rewards[:i] + rewards[i + 1 :]
        if not is_flat(others) and len(others) > ddof:
            result[i] /= deviation(others, ddof) + eps
    return result


def over_mean(rewards: list[float], *, eps: float) -> list[float]:
    mean = statistics.fmean(rewards)
    return [r / (mean + eps) if mean else r for r in centered(rewards)]


def lead(rewards: list[float]) -> list[float]:
    ranked = sorted(rewards, reverse=True)
    if len(ranked) < 2 or ranked[0] == ranked[1]:
        return [0.0] * len(rewards)
    return [ranked[0] - ranked[1] if r == ranked[0] else 0.0 for r in rewards]


PAIRS: dict[str, tuple[Advantage, Reference]] = {
    "center": (center_by_group, centered),
    "sample": (
        partial(standardize_by_group, ddof=1, eps=1e-4),
        partial(standardized, ddof=1, eps=1e-4),
    ),
    "population, eps 0": (
        partial(standardize_by_group, ddof=0, eps=0),
        partial(standardized, ddof=0, eps=0),
    ),
    "std": (partial(std_by_group, ddof=1), partial(deviations, ddof=1)),
    "std, population": (partial(std_by_group, ddof=0), partial(deviations, ddof=0)),
    "leave one out": (rloo, over_others),
    "leave one out, sample": (
        partial(standardize_leave_one_out, ddof=1, eps=1e-6),
        partial(over_others_standardized, ddof=1, eps=1e-6),
    ),
    "leave one out, population": (
        partial(standardize_leave_one_out, ddof=0, eps=1e-3),
        partial(over_others_standardized, ddof=0, eps=1e-3),
    ),
    "over mean": (
        partial(maxrl, eps=1e-6),
        partial(over_mean, eps=1e-6),
    ),
    "lead": (best_over_runner_up, lead),
}
FUNCTIONS = {name: function for name, (function, _) in PAIRS.items()} | {
    "batch": center_by_group_scale_by_batch
}
each_pair = pytest.mark.parametrize(("function", "reference"), PAIRS.values(), ids=PAIRS)
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)

scores = st.sampled_from([0.0, 0.1, 0.25, 0.7, 1.0, 3.0, NAN])


def loop(reference: Reference, rewards: list[float], ids: list[int]) -> Tensor:
    """Run a reference on the scored rewards of each group; the rest get 0."""
    result = [0.0] * len(rewards)
    for group in set(ids):
        members = [
            i
            for i, (r, each) in enumerate(zip(rewards, ids, strict=True))
            if each == group == each and not math.isnan(r)
        ]
        if members:
            values = reference([rewards[i] for i in members])
            for i, value in zip(members, values, strict=True):
                result[i] = value
    return torch.tensor(result, dtype=torch.float64)


@each_pair
@settings(max_examples=40)
@given(data=st.data())
def test_groups_by_ids_match_a_loop(
    function: Advantage, reference: Reference, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.sampled_from([-(2**63), -7, 0, 3, 10**12]), max_size=14))
    rewards = data.draw(st.lists(scores, min_size=len(ids), max_size=len(ids)))
    actual = function(torch.tensor(rewards, dtype=torch.float64), torch.tensor(ids, dtype=int))
    torch.testing.assert_close(actual, loop(reference, rewards, ids), **CLOSE)


@each_pair
@settings(max_examples=30)
@given(data=st.data())
def test_rows_and_blocks_match_a_loop(
    function: Advantage, reference: Reference, data: st.DataObject
) -> None:
    prompts, size = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 6)))
    count = prompts * size
    rewards = data.draw(st.lists(scores, min_size=count, max_size=count))
    wanted = loop(reference, rewards, [i // size for i in range(count)])
    flat = torch.tensor(rewards, dtype=torch.float64)
    torch.testing.assert_close(function(flat, size), wanted, **CLOSE)
    rows = function(flat.reshape(prompts, size))
    torch.testing.assert_close(rows, wanted.reshape(prompts, size), **CLOSE)


@settings(max_examples=40)
@given(st.lists(scores, min_size=2, max_size=12), st.sampled_from([0, 1]))
def test_batch_scale_matches_a_loop(rewards: list[float], ddof: int) -> None:
    ids = [i % 3 for i in range(len(rewards))]
    known = [r for r in rewards if not math.isnan(r)]
    scale = 1.0 if is_flat(known) else deviation(known, ddof) + 0.01
    actual = center_by_group_scale_by_batch(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(ids), ddof=ddof, eps=0.01
    )
    torch.testing.assert_close(actual, loop(centered, rewards, ids) / scale, **CLOSE)


def test_worked_numbers() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    tiny = {"rtol": 0, "atol": 1e-12}
    for actual, wanted in [
        (standardize_by_group(rewards, ddof=1, eps=0), [1.5, -0.5, -0.5, -0.5]),
        (standardize_by_group(rewards, ddof=0, eps=0), [3**0.5] + [-1 / 3**0.5] * 3),
        (rloo(rewards), [1.0] + [-1 / 3] * 3),
        (standardize_leave_one_out(rewards, eps=0), [1.0] + [-1 / 3**0.5] * 3),
        (maxrl(rewards, eps=0), [3.0, -1.0, -1.0, -1.0]),
        (best_over_runner_up(rewards), [1.0, 0.0, 0.0, 0.0]),
    ]:
        torch.testing.assert_close(actual, torch.tensor([wanted], dtype=torch.float64), **tiny)


@each_function
@settings(max_examples=20)
@given(st.lists(scores, min_size=12, max_size=12), st.permutations(range(12)))
def test_permuting_samples_permutes_advantages(
    function: Advantage, rewards: list[float], order: list[int]
) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    ids = torch.arange(12) // 4
    permuted = function(values[order], ids[order])
    torch.testing.assert_close(permuted, function(values, 4)[order], **CLOSE)


@pytest.mark.parametrize(
    "name", sorted(FUNCTIONS.keys() - {"over mean"}), ids=lambda name: name.replace(" ", "_")
)
@settings(max_examples=15)
@given(st.lists(scores, min_size=8, max_size=8), st.sampled_from([-2.0, 0.5, 64.0]))
def test_shifting_rewards_changes_nothing(name: str, rewards: list[float], shift: float) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    moved = FUNCTIONS[name](values + shift, 4)
    torch.testing.assert_close(moved, FUNCTIONS[name](values, 4), **CLOSE)


@settings(max_examples=20)
@given(st.lists(scores, min_size=8, max_size=8), st.sampled_from([0.01, 3.0, 1000.0]))
def test_scaling_rewards_changes_nothing_once_standardized(
    rewards: list[float], scale: float
) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    for function in (standardize_by_group, center_by_group_scale_by_batch):
        scaled = function(values * scale, 4, eps=0)
        torch.testing.assert_close(scaled, function(values, 4, eps=0), **CLOSE)


@pytest.mark.parametrize("function", [center_by_group, standardize_by_group, rloo])
def test_each_group_sums_to_zero(function: Advantage) -> None:
    advantages = function(torch.rand(64, 8, dtype=torch.float64))
    assert advantages.abs().max() > 0.1
    torch.testing.assert_close(
        advantages.sum(-1), torch.zeros(64, dtype=torch.float64), rtol=0, atol=1e-12
    )


@each_function
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6 + 0.3, -7.7])
def test_equal_rewards_get_exactly_zero(function: Advantage, reward: float) -> None:
    # In float32 the mean of five 0.1 is not 0.1, and the noise over eps = 0 would be +-1.
    rewards = torch.full((3, 5), abs(reward) if function is FUNCTIONS["over mean"] else reward)
    keywords = function.keywords if isinstance(function, partial) else {}
    wants_eps = "eps" in keywords or function is center_by_group_scale_by_batch
    options = {"eps": 0} if wants_eps else {}
    assert torch.equal(function(rewards, **options), torch.zeros(3, 5))
    assert torch.equal(
        function(rewards.flatten(), torch.arange(15) % 4, **options), torch.zeros(15)
    )


def test_the_only_success_is_not_blown_up_by_noise_of_the_others() -> None:
    rewards = torch.full((1, 7), 0.1)
    rewards[0, 3] = 1.0
    others = standardize_leave_one_out(rewards)
    torch.testing.assert_close(others[0, 3], torch.tensor(0.9), rtol=1e-6, atol=0)


def test_close_others_keep_their_deviation() -> None:
    # In float32, the group's variance less that of the success leaves nothing of the others'.
    rewards = torch.tensor([[1.0, 0.0, 1e-4, 2e-4, 3e-4]])
    wanted = over_others_standardized(rewards[0].tolist(), ddof=1, eps=1e-6)
    actual = standardize_leave_one_out(rewards)[0].tolist()
    assert actual == pytest.approx(wanted, rel=1e-5)


@each_function
def test_unscored_rewards_do_not_reach_their_group(function: Advantage) -> None:
    rewards = torch.tensor([[0.2, NAN, 0.9, 0.4], [NAN, NAN, NAN, NAN]])
    advantages = function(rewards)
    assert torch.equal(advantages[1], torch.zeros(4))
    assert advantages[0, 1] == 0
    scored = function(torch.tensor([[0.2, 0.9, 0.4]]))
    torch.testing.assert_close(advantages[0, [0, 2, 3]], scored[0], rtol=1e-6, atol=1e-7)


@each_function
def test_infinite_rewards_do_not_pass_for_zero(function: Advantage) -> None:
    assert not function(torch.tensor([[math.inf, 1.0, 0.0]])).isfinite().all()


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"over mean"}))
def test_rewards_of_minus_infinity_do_not_pass_for_zero(name: str) -> None:
    function = FUNCTIONS[name]
    # One that is infinitely bad takes nothing from the best one's lead over the second.
    bad = function(torch.tensor([[-math.inf, 1.0, 0.0]]))
    assert bad.isfinite().all() == (function is best_over_runner_up)


@each_function
@pytest.mark.parametrize(
    ("given_dtype", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
    ],
)
def test_result_is_wide_and_detached(
    function: Advantage, given_dtype: torch.dtype, wanted: torch.dtype
) -> None:
    rewards = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]], dtype=given_dtype)
    if rewards.is_floating_point():
        rewards.requires_grad_()
    kept = rewards.detach().clone()
    advantages = function(rewards)
    assert advantages.dtype == wanted
    assert not advantages.requires_grad
    assert torch.equal(rewards.detach(), kept)
    torch.testing.assert_close(advantages, function(kept.to(wanted)), rtol=0, atol=0)


@each_function
def test_empty_batches_stay_empty(function: Advantage) -> None:
    assert function(torch.empty(0, 4)).shape == (0, 4)
    assert function(torch.empty(0), 4).shape == (0,)
    assert function(torch.empty(0), torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("layout", ["rows", "ids"])
def test_compiles_without_a_graph_break(layout: str) -> None:
    rewards = torch.tensor([1.0, 0.0, NAN, 0.5])
    arguments = (rewards[None],) if layout == "rows" else (rewards, torch.tensor([2, 2, 2, 9]))
    compiled = torch.compile(
        lambda *each: standardize_by_group(*each), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(
        compiled(*arguments), standardize_by_group(*arguments), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("rewards", "groups", "error", "message"),
    [
        ([1.0], 1, TypeError, "rewards must be a torch.Tensor, got list"),
        (torch.ones(4, dtype=torch.complex64), 2, TypeError, "rewards must hold real numbers"),
        (torch.ones(2, 2, 2), None, ValueError, r"rewards must have shape \[P, G\], or \[B\]"),
        (torch.ones(2, 2), 2, ValueError, "groups must be None where rewards are"),
        (torch.ones(2, 0), None, ValueError, "rewards must hold G >= 1 per group"),
        (torch.ones(4), None, ValueError, "groups must be G or ids of shape"),
        (torch.ones(4), 3, ValueError, "groups = 3 must divide B = 4"),
        (torch.ones(4), 0, ValueError, "groups must be >= 1, got 0"),
        (torch.ones(4), True, TypeError, "groups must be an int, got bool"),
        (torch.ones(4), torch.ones(4), TypeError, "groups must be an integer tensor"),
        (torch.ones(4), torch.ones(3, dtype=int), ValueError, r"groups must have shape \[B\]"),
    ],
)
def test_rewards_and_groups_must_fit(
    rewards: Tensor, groups: int | Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        center_by_group(rewards, groups)
    with pytest.raises(error, match=message):
        GroupedRewards.of(rewards, groups)


@pytest.mark.parametrize(
    "function",
    [
        standardize_by_group,
        center_by_group_scale_by_batch,
        standardize_leave_one_out,
        lambda rewards, **options: gdpo(rewards[..., None], **options),
        whiten,
    ],
)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ddof": 2}, ValueError, "ddof must be 0 or 1, got int 2"),
        ({"ddof": True}, ValueError, "ddof must be 0 or 1, got bool"),
        ({"eps": -1e-9}, ValueError, "eps must be >= 0"),
        ({"eps": "tiny"}, TypeError, "eps must be a number"),
    ],
)
def test_options_must_make_sense(
    function: Advantage, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(torch.rand(2, 3), **options)


def test_further_options_must_make_sense() -> None:
    with pytest.raises(ValueError, match="ddof must be 0 or 1"):
        std_by_group(torch.ones(1, 2), ddof=3)
    with pytest.raises(ValueError, match="eps must be >= 0"):
        maxrl(torch.ones(1, 2), eps=-1.0)
    with pytest.raises(ValueError, match=r"weights must have shape \[K\] = \[2\], got \[3\]"):
        gdpo(torch.ones(1, 2, 2), weights=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"rewards must have shape \[P, G, K\], or \[B, K\]"):
        sum_rewards(torch.ones(3))
    with pytest.raises(ValueError, match="weights must be finite"):
        sum_rewards(torch.ones(1, 2), torch.tensor([1.0, NAN]))
    with pytest.raises(ValueError, match=r"weights must have shape of values = \[2\], got \[3\]"):
        whiten(torch.ones(2), torch.ones(3))
