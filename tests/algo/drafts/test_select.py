import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from igrpo_algo.drafts.select import (
    random_ties,
    select_best_draft,
    select_best_wrong_draft,
    select_random_draft,
    select_worst_draft,
    shortest_first,
)

NAN, INF = math.nan, math.inf
SCORES = st.sampled_from([NAN, -INF, -1.0, -0.0, 0.0, 0.5, 1.0, INF])


@st.composite
def tables(draw: st.DrawFn, count: int = 1) -> list[torch.Tensor]:
    """Draw `count` tables [P, N] of one shape, full of ties, NaN and infinities."""
    num_prompts, num_drafts = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    size = num_prompts * num_drafts
    rows = [draw(st.lists(SCORES, min_size=size, max_size=size)) for _ in range(count)]
    return [torch.tensor(row).reshape(num_prompts, num_drafts) for row in rows]


def best_by_loop(rewards: list[float], ties: list[float]) -> int:
    """Walk the row once and keep the first draft that nothing before it beats."""
    chosen, best = -1, None
    for index, (reward, tie) in enumerate(zip(rewards, ties, strict=True)):
        rank = (reward, -INF if math.isnan(tie) else tie)
        if not math.isnan(reward) and (best is None or rank > best):
            chosen, best = index, rank
    return chosen


def assert_chosen(chosen, rewards: torch.Tensor, index: list[int]) -> None:
    expected = [NAN if i < 0 else row[i] for i, row in zip(index, rewards.tolist(), strict=True)]
    assert chosen.index.dtype == torch.int64
    assert chosen.index.tolist() == index
    assert chosen.found.dtype == torch.bool
    assert chosen.found.tolist() == [i >= 0 for i in index]
    torch.testing.assert_close(  # a copy of the input: equal to the bit
        chosen.reward,
        torch.tensor(expected, dtype=rewards.dtype),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@given(tables(count=2))
@settings(max_examples=50)
def test_best_agrees_with_a_loop(pair):
    rewards, ties = pair
    no_ties = [0.0] * rewards.shape[1]
    assert_chosen(
        select_best_draft(rewards), rewards, [best_by_loop(r, no_ties) for r in rewards.tolist()]
    )
    rows = zip(rewards.tolist(), ties.tolist(), strict=True)
    assert_chosen(
        select_best_draft(rewards, tie_scores=ties), rewards, [best_by_loop(r, t) for r, t in rows]
    )


@given(tables(count=2))
@settings(max_examples=50)
def test_worst_agrees_with_a_loop(pair):
    rewards, ties = pair
    rows = zip((-rewards).tolist(), ties.tolist(), strict=True)
    assert_chosen(
        select_worst_draft(rewards, tie_scores=ties),
        rewards,
        [best_by_loop(r, t) for r, t in rows],
    )


@given(tables(), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_permuting_drafts_permutes_the_choice(pair, random):
    (rewards,) = pair
    order = list(range(rewards.shape[1]))
    random.shuffle(order)
    ties = torch.rand(rewards.shape)  # distinct: the lowest index decides nothing
    before = select_best_draft(rewards, tie_scores=ties)
    after = select_best_draft(rewards[:, order], tie_scores=ties[:, order])
    assert [order[i] if i >= 0 else -1 for i in after.index.tolist()] == before.index.tolist()


@pytest.mark.parametrize(
    ("rewards", "index"),
    [
        ([0.0, 1.0, 1.0], 1),  # a tie: the first of equals
        ([0.0, 0.0, 0.0], 0),  # all failed: a tie like any other
        ([NAN, -5.0, NAN], 1),  # never one that could not be scored, however low the others
        ([NAN, -INF, NAN], 1),  # -inf is a reward
        ([1.0, INF, NAN], 1),
        ([NAN, NAN, NAN], -1),
    ],
)
def test_best_by_hand(rewards, index):
    table = torch.tensor([rewards])
    assert_chosen(select_best_draft(table), table, [index])


def test_tie_scores_rank_only_equal_rewards():
    rewards = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    assert select_best_draft(rewards, tie_scores=torch.tensor([[1, 99, 3, 3]])).index.item() == 2
    nan_last = torch.tensor([[NAN, NAN, -7.0, NAN]])
    assert select_best_draft(rewards, tie_scores=nan_last).index.item() == 2
    assert select_best_draft(rewards, tie_scores=torch.full((1, 4), NAN)).index.item() == 0


def test_integer_tie_scores_are_compared_exactly():
    ties = torch.tensor([[2**60, 2**60 + 1]])  # one number in float64
    assert select_best_draft(torch.zeros(1, 2), tie_scores=ties).index.item() == 1
    lowest = torch.full((1, 2), torch.iinfo(torch.int64).min)
    assert select_best_draft(torch.zeros(1, 2), tie_scores=lowest).index.item() == 0


def test_shortest_first_prefers_the_shorter_draft():
    lengths = torch.tensor([[9, 4, 2]], dtype=torch.uint8)  # negating in uint8 would wrap around
    assert shortest_first(lengths).tolist() == [[-9, -4, -2]]
    rewards = torch.tensor([[1.0, 1.0, 0.0]])
    assert select_best_draft(rewards, tie_scores=shortest_first(lengths)).index.item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("select", [select_best_draft, select_worst_draft])
def test_reward_keeps_its_dtype_and_carries_no_gradient(select, dtype):
    rewards = torch.tensor([[0.25, NAN, 0.25], [NAN, NAN, NAN]], dtype=dtype, requires_grad=True)
    ties = torch.zeros(2, 3, requires_grad=True)
    before = rewards.detach().clone()
    chosen = select(rewards, tie_scores=ties)
    assert_chosen(chosen, rewards.detach(), [0, -1])
    assert not chosen.reward.requires_grad
    torch.testing.assert_close(rewards.detach(), before, rtol=0, atol=0, equal_nan=True)


def test_the_host_never_waits_for_a_value():
    """A fake tensor has no values: reading one on the host raises."""
    with FakeTensorMode():
        rewards, ties = torch.empty(3, 4), torch.empty(3, 4)
        for chosen in (
            select_best_draft(rewards, tie_scores=ties),
            select_worst_draft(rewards),
            select_random_draft(rewards, tie_scores=ties),
        ):
            assert [list(field.shape) for field in chosen] == [[3]] * 3


@pytest.mark.parametrize("select", [select_best_draft, select_worst_draft, select_random_draft])
def test_no_prompts_give_an_empty_choice(select):
    rewards = torch.empty(0, 4)
    assert_chosen(select(rewards, tie_scores=random_ties(4, seeds=[])), rewards, [])


def test_random_draft_is_uniform_over_the_scored():
    rewards = torch.tensor([[3.0, NAN, 1.0, INF]]).expand(6000, 4)
    chosen = select_random_draft(rewards, tie_scores=random_ties(4, seeds=range(6000)))
    counts = chosen.index.bincount(minlength=4).tolist()
    assert counts[1] == 0
    five_sigma = 5 * math.sqrt(6000 * (1 / 3) * (2 / 3))
    assert all(abs(counts[n] - 2000) < five_sigma for n in (0, 2, 3))
    assert_chosen(chosen, rewards, chosen.index.tolist())


def test_random_draft_needs_a_source_of_chance():
    with pytest.raises(ValueError, match=r"tie_scores must be given: random_ties\(...\), or ties="):
        select_random_draft(torch.zeros(1, 2))


def test_random_ties_prefer_none():
    state = torch.get_rng_state()
    ties = random_ties(3, seeds=[0, 2**63 - 1])
    assert ties.dtype == torch.float32
    assert ties.unique().numel() == 6
    assert ((ties >= 0) & (ties < 1)).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_ties_of_a_prompt_follow_its_own_seed_alone():
    ties = random_ties(3, seeds=[5, 6, 5])
    assert ties[0].tolist() == ties[2].tolist() == random_ties(3, seeds=[5])[0].tolist()
    assert ties[0].tolist() != ties[1].tolist()


@pytest.mark.parametrize("select", [select_best_draft, select_worst_draft, select_random_draft])
@pytest.mark.parametrize(
    ("rewards", "error", "message"),
    [
        ([[1.0]], TypeError, r"rewards must be a torch.Tensor, got list"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, r"rewards must be a floating-point"),
        (torch.ones(3), ValueError, r"rewards must have shape \[P, N\], got \[3\]"),
        (torch.ones(3, 0), ValueError, r"rewards must hold at least one draft, got shape \[3, 0\]"),
    ],
)
def test_bad_rewards(select, rewards, error, message):
    with pytest.raises(error, match=message):
        select(rewards)


@pytest.mark.parametrize(
    ("ties", "error", "message"),
    [
        ([[1.0, 2.0]], TypeError, r"tie_scores must be a torch.Tensor, got list"),
        (torch.ones(1, 2, dtype=torch.bool), TypeError, r"tie_scores must be an integer tensor"),
        (torch.ones(2), ValueError, r"tie_scores must have shape \[P, N\] = \[1, 2\], got \[2\]"),
    ],
)
def test_bad_tie_scores(ties, error, message):
    with pytest.raises(error, match=message):
        select_best_draft(torch.zeros(1, 2), tie_scores=ties)


@pytest.mark.parametrize(
    ("num_drafts", "seeds", "error", "message"),
    [
        (0, [1], ValueError, "num_drafts must be >= 1, got 0"),
        ((1, 2), [1], TypeError, "num_drafts must be an int, got tuple"),
        (2, 7, TypeError, "seeds must be a list, got int 7"),
        (2, [None], TypeError, "each of seeds must be an int, got NoneType"),
        (2, [-1], ValueError, "each of seeds must be >= 0, got -1"),
        (2, [2**63], ValueError, r"each of seeds must fit 64 bits, got"),
    ],
)
def test_bad_random_ties(num_drafts, seeds, error, message):
    with pytest.raises(error, match=message):
        random_ties(num_drafts, seeds=seeds)


def test_lengths_that_are_no_integers_make_no_ties():
    with pytest.raises(TypeError, match=r"lengths must be an integer tensor"):
        shortest_first(torch.ones(1, 2))


def test_the_best_wrong_draft_is_a_near_miss() -> None:
    rewards = torch.tensor(
        [[0.0, 1.0, 0.5], [1.0, 1.0, 2.0], [math.nan, 0.5, 1.0], [0.2, 0.2, 1.0]]
    )
    chosen = select_best_wrong_draft(rewards)
    assert chosen.index.tolist() == [2, -1, 1, 0]
    assert chosen.found.tolist() == [True, False, True, True]
    assert select_best_wrong_draft(rewards, success_reward=0.5).index.tolist() == [0, -1, -1, 0]
    ties = torch.tensor([[0.0, 1.0, 2.0]]).expand(4, 3)
    assert select_best_wrong_draft(rewards, tie_scores=ties).index.tolist() == [2, -1, 1, 1]


def test_the_best_wrong_draft_wants_a_number() -> None:
    with pytest.raises(TypeError, match="success_reward must be a number, got str '1'"):
        select_best_wrong_draft(torch.zeros(1, 2), success_reward="1")  # type: ignore[arg-type]
