"""A whole batch whitened, and several rewards made one."""

import math
import statistics

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_algo.advantages.of_groups import gdpo, standardize_by_group, sum_rewards, whiten

NAN = float("nan")
# float64 throughout: what is left is the order of the additions.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}

scores = st.sampled_from([0.0, 0.1, 0.25, 0.7, 1.0, 3.0, NAN])


def test_several_rewards_are_standardized_apart() -> None:
    first, second = torch.rand(2, 5, 4, dtype=torch.float64)
    second = 1000 * second
    second[2] = 7.0
    both = torch.stack([first, second], -1)
    wanted = 2 * standardize_by_group(first, eps=0.1) - standardize_by_group(second, eps=0.1)
    for weights in ([2.0, -1.0], torch.tensor([2.0, -1.0])):
        actual = gdpo(both, weights=weights, eps=0.1)
        torch.testing.assert_close(actual, wanted, **CLOSE)
    flat = gdpo(both.reshape(20, 2), torch.arange(20) // 4, weights=[2, -1], eps=0.1)
    torch.testing.assert_close(flat, wanted.flatten(), **CLOSE)
    unit = gdpo(both, eps=0.1)
    torch.testing.assert_close(unit, gdpo(both, weights=[1, 1], eps=0.1), **CLOSE)


def test_summed_rewards_skip_what_is_unscored() -> None:
    rewards = torch.tensor([[[1.0, 0.5], [NAN, 0.5], [1.0, NAN], [NAN, NAN]]])
    wanted = torch.tensor([[2.0, 1.5, 0.5, NAN]])
    actual = sum_rewards(rewards, [0.5, 3.0])
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        sum_rewards(rewards), torch.tensor([[1.5, 0.5, 1.0, NAN]]), rtol=0, atol=0, equal_nan=True
    )


@settings(max_examples=40)
@given(
    st.lists(st.tuples(scores, st.integers(0, 4)), min_size=1, max_size=10), st.sampled_from([0, 1])
)
def test_whitening_repeats_each_value_by_its_weight(
    weighed: list[tuple[float, int]], ddof: int
) -> None:
    known = [v for v, times in weighed if not math.isnan(v) for _ in range(times)]
    wanted = [0.0] * len(weighed)
    for i, (value, times) in enumerate(weighed):
        if times and not math.isnan(value) and len(set(known)) > 1:
            deviation = (statistics.pstdev, statistics.stdev)[ddof](known)
            wanted[i] = (value - statistics.fmean(known)) / (deviation + 0.01)
    values, weights = (
        torch.tensor(each, dtype=torch.float64) for each in zip(*weighed, strict=True)
    )
    actual = whiten(values, weights, ddof=ddof, eps=0.01)
    torch.testing.assert_close(actual, torch.tensor(wanted, dtype=torch.float64), **CLOSE)


def test_whitening_tokens_by_mask_equals_whitening_sequences_by_length() -> None:
    advantages = torch.randn(6, dtype=torch.float64)
    lengths = torch.tensor([3, 0, 5, 1, 4, 2])
    mask = torch.arange(5) < lengths[:, None]
    tokens = torch.where(mask, advantages[:, None], torch.tensor(math.inf))
    tokens[0, 4] = NAN
    by_token = whiten(tokens, mask)
    assert torch.equal(by_token[~mask], torch.zeros(15, dtype=torch.float64))
    by_length = whiten(advantages, lengths)
    torch.testing.assert_close(by_token, by_length[:, None] * mask, **CLOSE)


def test_whitening_equal_values_gives_exactly_zero() -> None:
    assert torch.equal(whiten(torch.full((7,), 0.1), eps=0), torch.zeros(7))
    assert torch.equal(whiten(torch.tensor([3.0]), ddof=1, eps=0), torch.zeros(1))
    assert whiten(torch.empty(0)).shape == (0,)
    assert torch.equal(whiten(torch.ones(2), torch.zeros(2)), torch.zeros(2))


def test_fractional_weights_whiten_like_their_multiples():
    values = torch.tensor([1.0, 2.0, 3.0, 9.0])
    weights = torch.tensor([1.0, 3.0, 2.0, -1.0])
    small, large = whiten(values, weights / 10), whiten(values, weights)
    # float32 sums of tenths; the value of negative weight is left out
    torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-6)
    assert large[3].item() == 0.0
