"""Metrics against counts by hand and loops over plain Python numbers."""

import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_algo.advantages.of_groups import standardize_by_group
from igrpo_algo.metrics import (
    accuracy_after_draft,
    copy_rate,
    draft_success_rate,
    pass_at_k,
    stage_uplift,
    zero_variance_rate,
)

NAN = float("nan")
# float64 throughout: what is left is the order of the additions.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

scores = st.sampled_from([0.0, 0.1, 1.0, NAN])


def double(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(max_examples=40)
@given(st.lists(st.tuples(scores, st.integers(-1, 3)), min_size=1, max_size=14))
def test_zero_variance_share_matches_a_loop(samples: list[tuple[float, int]]) -> None:
    groups = {
        group: {r for r, each in samples if each == group and not math.isnan(r)}
        for _, group in samples
    }
    distinct = [len(rewards) for rewards in groups.values() if rewards]
    wanted = statistics.fmean(n == 1 for n in distinct) if distinct else NAN
    rewards, ids = zip(*samples, strict=True)
    actual = zero_variance_rate(torch.tensor(rewards), torch.tensor(ids))
    torch.testing.assert_close(
        actual, torch.tensor(wanted), rtol=1e-6, atol=0, equal_nan=True, check_dtype=False
    )


def test_zero_variance_groups_are_those_without_advantages() -> None:
    rewards = torch.randint(0, 2, (200, 3)).float() / 10
    silent = (standardize_by_group(rewards) == 0).all(-1).double().mean()
    assert 0.1 < silent < 0.5
    # float32 sums of 200 shares.
    torch.testing.assert_close(zero_variance_rate(rewards).double(), silent, rtol=1e-5, atol=0)
    flat = zero_variance_rate(rewards.flatten(), 3)
    torch.testing.assert_close(flat, zero_variance_rate(rewards), rtol=0, atol=0)


def test_draft_success_needs_one_draft_that_reaches_the_threshold() -> None:
    rewards = double([[0.0, 0.5], [0.5, 1.0], [NAN, 1.0], [NAN, NAN], [0.4, 0.2]])
    torch.testing.assert_close(draft_success_rate(rewards), double(2 / 4), **CLOSE)
    torch.testing.assert_close(draft_success_rate(rewards, threshold=0.5), double(3 / 4), **CLOSE)
    assert draft_success_rate(torch.full((2, 3), NAN)).isnan()


def test_uplift_is_the_mean_difference_by_prompt() -> None:
    drafts = double([[0.0, 1.0], [0.0, NAN], [NAN, NAN], [1.0, 1.0]])
    refinements = double([[1.0, 1.0, 0.0, 1.0], [1.0, NAN, NAN, NAN], [1.0] * 4, [NAN] * 4])
    wanted = statistics.fmean([0.75 - 0.5, 1.0 - 0.0])
    torch.testing.assert_close(stage_uplift(drafts, refinements), double(wanted), **CLOSE)
    assert stage_uplift(drafts[2:3], refinements[2:3]).isnan()


def test_uplift_without_gaps_is_the_difference_of_means() -> None:
    drafts, refinements = torch.rand(7, 4).double(), torch.rand(7, 3).double()
    wanted = refinements.mean() - drafts.mean()
    torch.testing.assert_close(stage_uplift(drafts, refinements), wanted, **CLOSE)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_counts_the_subsets_with_a_success(n: int) -> None:
    for successes, k in itertools.product(range(n + 1), range(1, n + 1)):
        row = [1.0] * successes + [0.0] * (n - successes)
        subsets = list(itertools.combinations(row, k))
        wanted = sum(max(subset) for subset in subsets) / len(subsets)
        torch.testing.assert_close(pass_at_k(double([row]), k), double([wanted]), **CLOSE)


def test_pass_at_k_leaves_out_the_unscored() -> None:
    rewards = double([[1.0, 0.0, NAN, 0.0], [NAN, NAN, NAN, 1.0]])
    actual = pass_at_k(rewards, 2)
    torch.testing.assert_close(actual, double([2 / 3, NAN]), **CLOSE, equal_nan=True)
    shorter = pass_at_k(double([[1.0, 1.0, NAN], [0.0, NAN, NAN], [NAN, NAN, NAN]]), 3)
    assert shorter.isnan().all()
    torch.testing.assert_close(pass_at_k(rewards, 1, threshold=0.0), double([1.0, 1.0]), **CLOSE)


def test_pass_at_k_survives_large_counts() -> None:
    # C(1000, 500) overflows what a float32 can hold; the product of ratios does not.
    rewards = torch.zeros(1, 1000)
    rewards[0, 0] = 1.0
    actual = pass_at_k(rewards, 500)
    torch.testing.assert_close(actual, torch.tensor([0.5]), rtol=1e-4, atol=0)


def test_copies_are_told_by_the_text_that_was_shown() -> None:
    drafts = ["a b", None, "c", ""]
    refinements = [["a b", " a b\n", "<think>c</think>a b", "b a"], ["a b"], ["<think>c"], [""]]
    assert copy_rate(drafts, refinements) == pytest.approx(3 / 5)
    assert copy_rate(drafts, refinements, strip=None) == pytest.approx(2 / 5)
    assert copy_rate(["A B"], [["a b"]], strip=str.upper) == 1.0
    assert math.isnan(copy_rate([None, ""], [["a"], [""]]))
    assert math.isnan(copy_rate([], []))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_tensor_metrics_are_wide_and_detached(dtype: torch.dtype) -> None:
    rewards = torch.tensor([[1, 0, 0], [1, 1, 1]], dtype=dtype)
    if dtype.is_floating_point:
        rewards.requires_grad_()
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for value in (
        zero_variance_rate(rewards),
        draft_success_rate(rewards),
        stage_uplift(rewards, rewards),
        pass_at_k(rewards, 2),
    ):
        assert value.dtype == wanted
        assert not value.requires_grad


def test_bad_input_is_named() -> None:
    row = torch.ones(1, 4)
    with pytest.raises(ValueError, match=r"draft_rewards must have shape \[P, N\], got \[4\]"):
        draft_success_rate(row[0])
    with pytest.raises(ValueError, match="threshold must be finite"):
        draft_success_rate(row, threshold=NAN)
    with pytest.raises(ValueError, match=r"refinement_rewards must have shape .* P = 1, got"):
        stage_uplift(row, torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"refinement_rewards must be a torch\.Tensor"):
        stage_uplift(row, [[1.0]])
    with pytest.raises(ValueError, match="k must be at most N = 4, got 5"):
        pass_at_k(row, 5)
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        pass_at_k(row, 0)
    with pytest.raises(TypeError, match="threshold must be a number"):
        pass_at_k(row, 1, threshold="high")
    with pytest.raises(ValueError, match="groups must be G or ids"):
        zero_variance_rate(row[0])
    with pytest.raises(ValueError, match=r"refinements must have P = 2 entries"):
        copy_rate(["1", "2"], [["1"]])
    with pytest.raises(TypeError, match=r"drafts must be a list, got str"):
        copy_rate("12", [["1"], ["2"]])
    with pytest.raises(TypeError, match=r"refinements must be a list, got NoneType None"):
        copy_rate(["1"], None)
    with pytest.raises(TypeError, match="draft must be a string, got int 0"):
        copy_rate([0], [["0"]])
    with pytest.raises(TypeError, match=r"refinements\[1\] must be a list, got str 'two'"):
        copy_rate(["1", "2"], [["1"], "two"])


def test_accuracy_after_draft_by_hand() -> None:
    refinements = torch.tensor([[1.0, 0.2, NAN], [0.0, 1.5, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    after_right, after_wrong = accuracy_after_draft(
        refinements, torch.tensor([1.0, 2.0, 0.5, NAN]), threshold=1.0
    )
    assert float(after_right) == pytest.approx(3 / 5)
    assert float(after_wrong) == pytest.approx(1 / 3)
    nothing, _ = accuracy_after_draft(refinements[:1], torch.tensor([0.0]))
    assert nothing.isnan()
    with pytest.raises(ValueError, match=r"draft_rewards must have shape \[P\]"):
        accuracy_after_draft(refinements, torch.zeros(3))
