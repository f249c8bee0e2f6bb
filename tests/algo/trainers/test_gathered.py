"""The choice of drafts over a whole batch; on several ranks, under the trainers themselves."""

import pytest
import torch

from igrpo_algo import Completion, DraftRules
from igrpo_algo.drafts.rules import Fallback, Ties
from igrpo_algo.trainers.draft_layout import DraftLayout
from igrpo_algo.trainers.gathered import share_drafts

DRAFTS = [Completion([7] * length, str(length)) for length in (3, 2, 1, 4)]
LAYOUT = DraftLayout(rows=4, rank=0, num_drafts=2, num_refinements=2)


@pytest.mark.parametrize(
    ("rewards", "chosen"),
    [([[0.0, 1.0], [1.0, 0.0]], {0: "2", 1: "1"}), ([[0.0, 0.0], [1.0, 1.0]], {1: "1"})],
)
def test_each_prompt_gets_the_draft_that_the_rules_choose(
    rewards: list[list[float]], chosen: dict[int, str]
) -> None:
    rules = DraftRules(ties=Ties.SHORTEST, failed_below=0.5, when_failed=Fallback.PLAIN_PROMPT)
    shared = share_drafts(rules, torch.tensor(rewards), DRAFTS, LAYOUT, 0, 1)
    assert {prompt: draft.text for prompt, draft in shared.items()} == chosen


def test_chance_hangs_on_the_seed_the_step_and_the_prompt() -> None:
    rules, alike = DraftRules(ties=Ties.RANDOM), torch.zeros(2, 2)
    drawn = [
        share_drafts(rules, alike, DRAFTS, LAYOUT, seed, step)
        for seed in range(3)
        for step in range(8)
    ]
    assert len({(each[0].text, each[1].text) for each in drawn}) == 4
