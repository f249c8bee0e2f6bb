"""What is particular to each baseline; layouts and conventions are in test_advantages.py."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_algo.advantages.baselines import (
    best_over_runner_up,
    maxrl,
    opo,
    rloo,
    standardize_leave_one_out,
)
from igrpo_algo.advantages.of_groups import center_by_group

NAN = float("nan")
# float64 throughout: what is left is the order of the additions.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.1, 0.7, 3.0, NAN]), st.integers(0, 30), st.integers(-2, 2)
        ),
        min_size=1,
        max_size=12,
    )
)
def test_weighted_baseline_matches_a_loop(samples: list[tuple[float, int, int]]) -> None:
    wanted = []
    for reward, _, group in samples:
        peers = [(r, w) for r, w, other in samples if other == group and not math.isnan(r)]
        total = sum(w for _, w in peers)
        if math.isnan(reward):
            wanted.append(0.0)
        elif total:
            wanted.append(reward - sum(r * w for r, w in peers) / total)
        else:
            wanted.append(reward - sum(r for r, _ in peers) / len(peers))
    rewards, weights, ids = (torch.tensor(each) for each in zip(*samples, strict=True))
    actual = opo(rewards.double(), weights, ids)
    torch.testing.assert_close(actual, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-6)


def test_equal_weights_are_no_weights() -> None:
    rewards = torch.rand(5, 4, dtype=torch.float64)
    actual = opo(rewards, torch.full((5, 4), 17))
    torch.testing.assert_close(actual, center_by_group(rewards), **CLOSE)
    blocks = opo(rewards.flatten(), torch.full((20,), 17), 4)
    torch.testing.assert_close(blocks, center_by_group(rewards).flatten(), **CLOSE)


def test_weighted_baseline_of_equal_or_lone_rewards_is_exactly_zero() -> None:
    weights = torch.tensor([[3, 1, 7], [2, 2, 0]])
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.3, NAN, NAN]])
    assert torch.equal(opo(rewards, weights), torch.zeros(2, 3))


def test_leave_one_out_is_the_centered_reward_stretched() -> None:
    rewards = torch.rand(6, 5, dtype=torch.float64)
    torch.testing.assert_close(rloo(rewards), center_by_group(rewards) * 5 / 4, **CLOSE)


def test_the_other_of_a_pair_has_no_deviation_to_divide_by() -> None:
    for ddof in (0, 1):
        advantages = standardize_leave_one_out(torch.tensor([[1.0, 0.25]]), ddof=ddof, eps=0)
        assert advantages.tolist() == [[0.75, -0.75]]


def test_binary_rewards_over_their_mean_weigh_success_by_its_rarity() -> None:
    rewards = torch.zeros(8)
    rewards[:2] = 1
    advantages = maxrl(rewards, 8, eps=0)
    assert advantages.tolist() == [3.0] * 2 + [-1.0] * 6
    assert torch.equal(maxrl(torch.zeros(1, 4), eps=0), torch.zeros(1, 4))


def test_only_a_strict_best_leads() -> None:
    rewards = torch.tensor([[0.5, 0.5, 0.25], [NAN, 0.5, 0.25], [NAN, 0.5, NAN]])
    wanted = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.25, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(best_over_runner_up(rewards), wanted)


def test_weights_must_fit_the_rewards() -> None:
    with pytest.raises(ValueError, match=r"weights must have shape of rewards = \[2, 3\], got"):
        opo(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(TypeError, match=r"weights must be a torch.Tensor, got list"):
        opo(torch.ones(1, 2), [1, 2])
    with pytest.raises(ValueError, match="weights must not be negative"):
        opo(torch.ones(1, 2), torch.tensor([[1, -1]]))
    unknown = torch.tensor([[1.0, torch.nan]])
    with pytest.raises(ValueError, match="weights must not be negative or NaN"):
        opo(torch.ones(1, 2), unknown)
    rewards, weights = torch.tensor([[1.0, 0.0, torch.nan]]), torch.tensor([[1.0, 2.0, torch.nan]])
    wanted = opo(rewards, weights.nan_to_num())  # where no reward is scored, no weight counts
    torch.testing.assert_close(opo(rewards, weights), wanted, rtol=0, atol=0, equal_nan=True)


def test_over_the_mean_of_negative_rewards_every_sign_would_turn() -> None:
    with pytest.raises(ValueError, match="rewards must not be negative"):
        maxrl(torch.tensor([[0.0, -1.0]]))
    assert maxrl(torch.tensor([[NAN, 1.0, 0.0]]), eps=0).tolist() == [[0.0, 1.0, -1.0]]


def test_weights_that_sum_to_less_than_one_still_weigh():
    """Normalized lengths are legal: no floor of 1 under their sum."""
    rewards, weights = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.3, 0.1]])
    centered = opo(rewards, weights)
    # float32 quotients of short decimals
    torch.testing.assert_close(centered, torch.tensor([[0.25, -0.75]]), rtol=1e-6, atol=1e-7)
