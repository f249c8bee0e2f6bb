"""Which draft Stage 2 sees: on tensors, beside a loop over prompts that reads as the rules do."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_algo.drafts.rules import DraftRules, Fallback, Ties
from igrpo_algo.drafts.select import (
    SelectedDrafts,
    random_ties,
    select_best_draft,
    select_best_wrong_draft,
    select_random_draft,
    select_worst_draft,
)
from igrpo_algo.drafts.splice import Spliced, TextSplice
from igrpo_algo.drafts.text import DraftTemplate
from igrpo_algo.rollouts.completions import Completion

NAN = math.nan
ARROW = TextSplice(DraftTemplate(" -> ", ""))
SELECTS = [
    select_best_draft,
    select_worst_draft,
    select_best_wrong_draft,
    select_random_draft,
]
REWARDS = st.sampled_from([NAN, 0.0, 0.5, 1.0])


def choose(rewards, seeds=None, *, rules=None, **tensors):
    rewards = torch.tensor(rewards)
    return (rules or DraftRules()).choose(rewards, seeds=seeds or range(len(rewards)), **tensors)


@st.composite
def cases(draw):
    """Rules, and tables of rewards, scores and lengths of one shape."""
    num_prompts, num_drafts = draw(st.integers(1, 4)), draw(st.integers(1, 4))

    def table(values):
        return [[draw(values) for _ in range(num_drafts)] for _ in range(num_prompts)]

    ties = draw(st.sampled_from(Ties))
    select = draw(st.sampled_from(SELECTS if ties is Ties.RANDOM else SELECTS[:3]))
    failed_below = draw(st.sampled_from([None, 0.5, 1.0]))
    fallbacks = st.sampled_from(Fallback if failed_below else [Fallback.CHOSEN_DRAFT])
    rules = DraftRules(
        select,
        ties=ties,
        failed_below=failed_below,
        when_failed=draw(fallbacks),
        when_solved=draw(fallbacks),
        when_unscored=draw(st.sampled_from([Fallback.PLAIN_PROMPT, Fallback.SKIP])),
        dropout=draw(st.sampled_from([0, 0.5])),
    )
    return rules, table(REWARDS), table(REWARDS), table(st.integers(0, 2))


def by_loop(rules, rewards, scores, lengths, draws):
    """One prompt by the rules, in words: index, failed, dropped, skipped, plain."""
    dropout_draw, *tie_draws = draws
    sign = dict(zip(SELECTS, (1, -1, 1, 0), strict=True))[rules.select]
    ties = {Ties.FIRST: [0] * 9, Ties.SHORTEST: [-n for n in lengths], Ties.RANDOM: tie_draws}
    scored = [n for n, s in enumerate(scores) if not math.isnan(s + rewards[n])]
    if rules.select is select_best_wrong_draft:
        scored = [n for n in scored if scores[n] < 1.0]
    order = sorted(scored, key=lambda n: (-sign * scores[n], -ties[rules.ties][n], n))
    failed = rules.failed_below is not None and not any(r >= rules.failed_below for r in rewards)
    index = order[0] if order else -1
    known = [r for r in rewards if not math.isnan(r)]
    solved = rules.failed_below is not None and min(known, default=NAN) >= rules.failed_below
    if known and failed and rules.when_failed is not Fallback.CHOSEN_DRAFT:
        return index, True, False, rules.when_failed is Fallback.SKIP, True
    if solved and rules.when_solved is not Fallback.CHOSEN_DRAFT:
        return index, False, False, rules.when_solved is Fallback.SKIP, True
    if not order:
        return -1, failed, False, rules.when_unscored is Fallback.SKIP, True
    dropped = dropout_draw < rules.dropout
    return order[0], failed, dropped, False, dropped


@given(cases())
@settings(max_examples=150, deadline=None)
def test_choices_agree_with_a_loop_over_prompts(case):
    rules, rewards, scores, lengths = case
    count, num_drafts = len(rewards), len(rewards[0])
    seeds = [3 * p + 1 for p in range(count)]
    chosen = rules.choose(
        torch.tensor(rewards, dtype=torch.float64),
        scores=torch.tensor(scores, dtype=torch.float64),
        lengths=torch.tensor(lengths),
        seeds=seeds,
    )
    draws = random_ties(1 + num_drafts, seeds=seeds).tolist()
    for p in range(count):
        wanted = by_loop(rules, rewards[p], scores[p], lengths[p], draws[p])
        names = ("index", "failed", "dropped", "skipped", "plain")
        assert tuple(getattr(chosen, name)[p].item() for name in names) == wanted
        reward = rewards[p][wanted[0]] if wanted[0] >= 0 else NAN
        assert chosen.reward[p].item() == pytest.approx(reward, abs=0, rel=0, nan_ok=True)


@given(cases())
@settings(max_examples=40, deadline=None)
def test_a_prompt_is_chosen_for_alike_whatever_its_neighbors(case):
    rules, *tables = case
    rewards, scores, lengths = map(torch.tensor, tables)
    seeds = list(range(len(rewards)))
    whole = rules.choose(rewards, scores=scores, lengths=lengths, seeds=seeds)
    for p in seeds:
        row = slice(p, p + 1)
        alone = rules.choose(
            rewards[row], scores=scores[row], lengths=lengths[row], seeds=seeds[row]
        )
        for name, value in alone._asdict().items():
            torch.testing.assert_close(
                value, getattr(whole, name)[row], rtol=0, atol=0, equal_nan=True
            )


def test_the_default_is_the_best_draft_whatever_its_reward():
    chosen = choose([[0.0, 1.0, 1.0], [-2.0, NAN, -1.0], [NAN, NAN, NAN]])
    assert chosen.index.tolist() == [1, 2, -1]
    assert chosen.reward.tolist()[:2] == [1.0, -1.0]
    assert chosen.reward[2].isnan()
    assert chosen.plain.tolist() == [False, False, True]
    assert not torch.stack([chosen.failed, chosen.dropped, chosen.skipped]).any()


def test_failure_looks_at_the_training_reward_and_the_score_only_ranks():
    rules = DraftRules(selection_score=len, failed_below=1.0, when_failed=Fallback.PLAIN_PROMPT)
    high_scores = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    chosen = choose([[0.0, 0.5], [0.0, 1.0]], rules=rules, scores=high_scores)
    assert chosen.index.tolist() == [0, 0]
    assert chosen.reward.tolist() == [0.0, 0.0]
    assert chosen.failed.tolist() == chosen.plain.tolist() == [True, False]


def test_failure_is_of_all_drafts_and_not_of_the_chosen_one():
    rules = DraftRules(select_worst_draft, failed_below=1.0, when_failed=Fallback.SKIP)
    assert choose([[0.0, 1.0]], rules=rules).skipped.tolist() == [False]


def test_a_draft_without_a_training_reward_is_never_chosen():
    assert choose([[0.0, NAN]], scores=torch.tensor([[0.0, 9.0]])).index.tolist() == [0]


@pytest.mark.parametrize(
    ("share", "least", "most"), [(0.0, 0, 0), (0.3, 250, 350), (1.0, 999, 999)]
)
def test_dropout_takes_its_share_of_the_drafts(share, least, most):
    rewards = torch.zeros(1000, 2)
    rewards[0] = NAN  # nothing to take away
    seeds = [random.Random(p).getrandbits(63) for p in range(1000)]
    chosen = DraftRules(dropout=share).choose(rewards, seeds=seeds)
    assert least <= chosen.dropped.sum() <= most
    assert chosen.plain.tolist() == [True, *chosen.dropped[1:].tolist()]
    assert chosen.index.tolist() == [-1] + [0] * 999


def test_dropout_and_random_drafts_are_independent():
    rules = DraftRules(select_random_draft, ties=Ties.RANDOM, dropout=0.5)
    chosen = rules.choose(torch.zeros(4000, 2), seeds=range(4000))
    kept, taken = (chosen.index[chosen.dropped == dropped].double() for dropped in (0, 1))
    assert abs(kept.mean() - taken.mean()) < 5 * math.sqrt(0.25 / 2000 * 2)


def test_choices_carry_no_gradient():
    rewards = torch.tensor([[0.0, 1.0]], requires_grad=True)
    assert not DraftRules().choose(rewards, seeds=[0]).reward.requires_grad


def test_no_prompts_give_empty_choices():
    chosen = DraftRules().choose(torch.zeros(0, 4), seeds=[])
    assert [list(field.shape) for field in chosen] == [[0]] * 6


def test_a_draft_conditions_its_prompt():
    rules = DraftRules(splice=ARROW)
    assert rules.condition("q", Completion([1], "2")) == ("q -> 2", "2", 0)


@pytest.mark.parametrize("left", ["", " \n"])
def test_where_nothing_of_a_draft_stands_the_prompt_is_plain(left):
    rules = DraftRules(splice=lambda prompt, draft: Spliced(f"{prompt} -> {left}", left, 3))
    assert rules.condition("q", Completion([1], "2")) == ("q", "", 3)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"select": "best"}, TypeError, "select must be callable, got str 'best'"),
        ({"splice": "end"}, TypeError, "splice must be callable, got str 'end'"),
        ({"selection_score": 1}, TypeError, "selection_score must be callable or None, got int 1"),
        ({"ties": "random"}, TypeError, "ties must be a Ties, got str 'random'"),
        ({"when_failed": "skip"}, TypeError, "when_failed must be a Fallback, got str 'skip'"),
        ({"when_unscored": None}, TypeError, "when_unscored must be a Fallback"),
        ({"when_failed": Fallback.SKIP}, ValueError, "when_failed = .* without failed_below"),
        ({"when_solved": 1}, TypeError, "when_solved must be a Fallback, got int 1"),
        ({"when_solved": Fallback.SKIP}, ValueError, "when_solved = .* without failed_below"),
        ({"when_unscored": Fallback.CHOSEN_DRAFT}, ValueError, "when_unscored must be"),
        ({"failed_below": NAN}, ValueError, "failed_below must be finite"),
        ({"dropout": 1.5}, ValueError, "dropout must be <= 1, got 1.5"),
        ({"select": select_random_draft}, ValueError, "ties=Ties.RANDOM"),
        ({"select": lambda rewards, *, tie_scores: 0}, TypeError, "the index that select returns"),
    ],
)
def test_rules_that_cannot_work_are_refused_when_made(fields, error, match):
    with pytest.raises(error, match=match):
        DraftRules(**fields)


@pytest.mark.parametrize("index", [2, -2])
def test_a_select_that_gives_the_index_of_no_draft_is_named(index):
    def select(rewards, *, tie_scores=None):
        return SelectedDrafts(torch.tensor([index]), rewards[:, 0], rewards[:, 0] == 0)

    with pytest.raises(ValueError, match=rf"below N = 2 or -1 for none, got \[{index}\]"):
        DraftRules(select)


@pytest.mark.parametrize(
    ("rules", "arguments", "error", "match"),
    [
        ({}, {"rewards": [[0.0]]}, TypeError, "rewards must be a torch.Tensor, got list"),
        ({}, {"rewards": torch.zeros(2)}, ValueError, r"rewards must have shape \[P, N\]"),
        ({}, {"rewards": torch.zeros(1, 0)}, ValueError, "at least one draft"),
        ({}, {"seeds": [1, 2]}, ValueError, "seeds must hold P = 1 seeds, got 2"),
        ({}, {"scores": torch.zeros(1, 3)}, ValueError, r"scores must have shape \[P, N\]"),
        ({"selection_score": len}, {}, ValueError, "scores must be given"),
        ({"ties": Ties.SHORTEST}, {}, ValueError, "lengths must be given"),
        ({}, {"seeds": [-1]}, ValueError, "each of seeds must be >= 0, got -1"),
        ({}, {"lengths": torch.zeros(1, 2)}, TypeError, "lengths must be an integer tensor"),
        (
            {},
            {"lengths": torch.zeros(2, 2, dtype=torch.int64)},
            ValueError,
            r"lengths must have shape \[P, N\] = \[1, 2\]",
        ),
    ],
)
def test_what_choose_refuses(rules, arguments, error, match):
    with pytest.raises(error, match=match):
        DraftRules(**rules).choose(**{"rewards": torch.zeros(1, 2), "seeds": [0], **arguments})


def test_a_draft_only_where_drafts_differ():
    rules = DraftRules(
        failed_below=1.0, when_failed=Fallback.PLAIN_PROMPT, when_solved=Fallback.PLAIN_PROMPT
    )
    chosen = choose([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, NAN]], rules=rules)
    assert chosen.plain.tolist() == [False, True, True, True]
    assert chosen.index.tolist() == [1, 0, 0, 0]


def test_a_solved_prompt_is_skipped_though_no_draft_of_it_is_wrong():
    rules = DraftRules(select_best_wrong_draft, failed_below=1.0, when_solved=Fallback.SKIP)
    chosen = choose([[0.0, 1.0], [1.0, 1.0], [NAN, NAN]], rules=rules)
    assert chosen.index.tolist() == [0, -1, -1]
    assert chosen.skipped.tolist() == [False, True, False]
    assert chosen.plain.tolist() == [False, True, True]
