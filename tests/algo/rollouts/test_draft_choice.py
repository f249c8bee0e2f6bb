"""Which draft the refinements of a rollout see, and whether any: the rules, in both forms."""

import math
from dataclasses import replace

import pytest
from canned_rollouts import ARROW, PROMPTS, SPLICE, both, by_text, canned, graded, listed

from igrpo_algo.drafts.rules import DraftRules, Fallback, Ties
from igrpo_algo.drafts.select import select_random_draft, select_worst_draft
from igrpo_algo.drafts.splice import TokenSplice
from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.rollouts.two_stage import two_stage_rollout

RANDOM = DraftRules(select_random_draft, ties=Ties.RANDOM)


def drafts(texts, *, rounds=1, **rules):
    """Roll out one prompt with these drafts, under these rules, and one refinement of reward 0."""
    return two_stage_rollout(
        ["q"],
        listed(*texts, *["0"] * rounds),
        by_text,
        num_drafts=len(texts),
        num_refinements=1,
        rounds=rounds,
        rules=replace(ARROW, **rules),
    )


def test_ties_go_to_the_first_or_to_the_shortest():
    def sampler(prompts, n, seed):
        return [[Completion([1] * (3 - i), "1") for i in range(n)] for _ in prompts]

    for ties, index in ((Ties.FIRST, 0), (Ties.SHORTEST, 2)):
        rules = DraftRules(ties=ties)
        rollouts = two_stage_rollout(["q"], sampler, by_text, num_drafts=3, rules=rules)
        assert rollouts.chosen.tolist() == [index]


def test_controls():
    assert drafts(["1", "0", "2"], select=select_worst_draft).chosen.tolist() == [1]
    random = both(PROMPTS * 8, canned, graded, rules=RANDOM, seed=4)
    assert len(set(random.chosen.tolist())) > 2
    assert random != two_stage_rollout(PROMPTS * 8, canned, graded, rules=RANDOM, seed=5)


def test_a_selection_score_ranks_and_the_reward_trains():
    def shortest(prompts, completions):
        return [-len(c) for c in completions]

    rollouts = drafts(["10", "5", "none"], selection_score=shortest)
    assert rollouts.chosen.tolist() == [1]
    assert rollouts.draft_rewards[0, :2].tolist() == [10.0, 5.0]
    assert rollouts[0].choices[0].reward == 5.0
    both(PROMPTS, canned, graded, rules=DraftRules(selection_score=shortest), seed=1)


def test_a_draft_without_a_reward_is_not_selected_by_another_score():
    high = lambda prompts, completions: [9.0 if c == "none" else 0.0 for c in completions]  # noqa: E731
    assert drafts(["0", "none"], selection_score=high).chosen.tolist() == [0]


@pytest.mark.parametrize(
    ("rule", "prompts", "skipped"),
    [
        (Fallback.CHOSEN_DRAFT, ["q -> 0.5"], False),
        (Fallback.PLAIN_PROMPT, ["q"], False),
        (Fallback.SKIP, ["q"], True),
    ],
)
def test_all_drafts_failed(rule, prompts, skipped):
    rollouts = drafts(["0", "0.5"], failed_below=1.0, when_failed=rule)
    assert rollouts.failed.tolist() == [True]
    assert rollouts.chosen.tolist() == [1]
    assert rollouts.refinements.prompts == prompts
    assert rollouts.skipped.tolist() == [skipped]
    assert rollouts.refinement_rewards.isnan().tolist() == [[skipped]]
    good = drafts(["0", "1"], failed_below=1.0, when_failed=rule)
    assert good.refinements.prompts == ["q -> 1"]
    assert not good.failed.any()


def test_failure_is_of_all_drafts_not_of_the_chosen_one():
    rule = Fallback.PLAIN_PROMPT
    worst = drafts(["0", "1"], select=select_worst_draft, failed_below=1.0, when_failed=rule)
    assert worst.refinements.prompts == ["q -> 0"]


@pytest.mark.parametrize(
    ("rule", "skipped"), [(Fallback.PLAIN_PROMPT, False), (Fallback.SKIP, True)]
)
def test_no_draft_scored(rule, skipped):
    rollouts = drafts(["none", "none"], when_unscored=rule)
    assert rollouts.refinements.prompts == ["q"]
    assert rollouts.found.tolist() == [False]
    assert rollouts.skipped.tolist() == [skipped]
    assert not rollouts.conditioned.any()
    assert math.isnan(rollouts[0].choices[0].reward)


def test_skipped_prompts_leave_the_others_their_seeds():
    keep, skip = (
        DraftRules(failed_below=2.0),
        DraftRules(failed_below=2.0, when_failed=Fallback.SKIP),
    )
    all_of_them = both(PROMPTS * 4, canned, graded, rules=keep, seed=9)
    some = both(PROMPTS * 4, canned, graded, rules=skip, seed=9)
    assert 0 < some.skipped.sum() < 20
    for whole, part in zip(all_of_them, some, strict=True):
        assert part == whole or part.choices[0].skipped


def test_an_empty_draft_gives_the_plain_prompt():
    thinking = listed("<think>never ends", "0")
    rollouts = two_stage_rollout(
        ["q"], thinking, lambda prompts, completions: [1.0], num_drafts=1, num_refinements=1
    )
    assert rollouts.refinements.prompts == ["q"]
    assert rollouts.chosen.tolist() == [0]
    assert not rollouts.conditioned.any()


def test_draft_dropout():
    always = drafts(["1"], dropout=1.0)
    assert always.refinements.prompts == ["q"]
    assert always.dropped.tolist() == [True]
    assert always.chosen.tolist() == [0]
    whole = both(PROMPTS * 20, canned, graded, seed=2)
    half = both(PROMPTS * 20, canned, graded, rules=DraftRules(dropout=0.5), seed=2)
    assert 30 < half.dropped.sum() < 70
    assert not whole.dropped.any()
    for full, dropped in zip(whole, half, strict=True):
        assert dropped == full or dropped.choices[0].dropped


def test_later_rounds_take_the_best_so_far():
    rollouts = two_stage_rollout(
        ["q"],
        listed("1", "0", "3", "2", "4", "4"),
        by_text,
        num_drafts=2,
        num_refinements=2,
        rounds=2,
        rules=ARROW,
    )
    assert [s.prompt for s in rollouts[0].refinements] == ["q -> 1", "q -> 3"]
    assert [c.index for c in rollouts[0].choices] == [0, 2]
    assert drafts(["5", "0"], rounds=3).refinements.prompts == ["q -> 5"]
    both(PROMPTS, canned, graded, rounds=3, seed=1, rules=DraftRules(dropout=0.3))


def test_what_was_cut_is_told():
    rollouts = both(
        [[1, 2]] * 9,
        canned,
        lambda prompts, completions: [1.0] * len(completions),
        rules=DraftRules(splice=TokenSplice(max_draft_tokens=1)),
        seed=8,
    )
    first = rollouts.draft_lengths[:, 0]
    assert rollouts.tokens_cut.tolist() == (first - 1).clamp(min=0).tolist()
    assert rollouts.tokens_cut.max() == 2
    assert [len(prompt) for prompt in rollouts.refinements.prompts] == (2 + first.sign()).tolist()


def test_skipped_prompts_stay_skipped_in_later_rounds():
    rules = DraftRules(failed_below=3.0, when_failed=Fallback.SKIP)
    rollouts = both(PROMPTS, canned, graded, rounds=2, num_refinements=3, rules=rules, seed=1)
    assert rollouts.skipped.all()
    assert rollouts.refinement_rewards.shape == (5, 3)
    assert rollouts.refinement_rewards.isnan().all()
    assert rollouts.chosen.tolist() == rollouts.until_round(1).chosen.tolist()


@pytest.mark.parametrize("rules", [DraftRules(), replace(RANDOM, dropout=0.5, splice=SPLICE)])
def test_no_drafts_is_grpo_whatever_the_rules(rules):
    rollouts = both(PROMPTS, canned, graded, num_drafts=0, seed=0, rules=rules)
    assert rollouts.refinements.prompts == PROMPTS
    assert not rollouts.found.any()
    assert not rollouts.conditioned.any()
