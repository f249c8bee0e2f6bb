"""Which rank draws which draft, against a plain loop."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from igrpo_algo.drafts.rules import DraftRules
from igrpo_algo.trainers.draft_layout import DraftLayout


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(2, 6))
def test_layout_deals_all_drafts_to_ranks_that_hold_their_prompt(
    world: int, prompts: int, num_drafts: int, num_refinements: int
) -> None:
    assume(prompts * num_refinements % world == 0)
    assume(prompts * num_drafts % world == 0)
    rows = prompts * num_refinements // world
    row_prompts = [p for p in range(prompts) for _ in range(num_refinements)]
    draft_prompts = [p for p in range(prompts) for _ in range(num_drafts)]
    dealt: list[int] = []
    for rank in range(world):
        layout = DraftLayout(rows, rank, num_drafts, num_refinements)
        mine = row_prompts[rank * rows : (rank + 1) * rows]
        assert layout.row_prompts == mine
        assert [mine[row] for row in layout.draft_rows] == [draft_prompts[d] for d in layout.drafts]
        dealt += layout.drafts
    assert dealt == list(range(prompts * num_drafts))


def test_layout_of_groups_that_straddle() -> None:
    # P = 2, G = 3, N = 6 on two ranks of 3 rows, then on three ranks of 2 rows.
    assert DraftLayout(3, 1, 6, 3).row_prompts == [1, 1, 1]
    middle = DraftLayout(2, 1, 6, 3)
    assert middle.row_prompts == [0, 1]
    assert middle.drafts == range(4, 8)
    assert middle.draft_rows == [0, 0, 1, 1]


def test_layout_refuses_what_cannot_be_dealt() -> None:
    with pytest.raises(ValueError, match=r"whole number of drafts .* got 2 \* 3 / 4"):
        DraftLayout(2, 0, 3, 4)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_each_chosen_draft_is_found_on_the_one_rank_that_drew_it(
    world: int, prompts: int, num_drafts: int, seed: int
) -> None:
    assume(prompts * 2 % world == 0)
    assume(prompts * num_drafts % world == 0)
    rewards = torch.rand(prompts, num_drafts, generator=torch.Generator().manual_seed(seed))
    rewards[rewards < 0.1] = torch.nan
    choices = DraftRules(dropout=0.3).choose(rewards, seeds=range(prompts))
    drawn = [f"{prompt}-{draft}" for prompt in range(prompts) for draft in range(num_drafts)]
    found: dict[int, str] = {}
    for rank in range(world):
        layout = DraftLayout(prompts * 2 // world, rank, num_drafts, 2)
        here = [drawn[draft] for draft in layout.drafts]
        for prompt, place in layout.chosen_here(choices).items():
            assert prompt not in found
            found[prompt] = here[place]
    wanted = zip(choices.index.tolist(), choices.plain.tolist(), strict=True)
    assert found == {p: f"{p}-{index}" for p, (index, plain) in enumerate(wanted) if not plain}
