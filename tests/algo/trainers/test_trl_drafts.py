"""Layout over ranks, choice and splicing, each against a plain loop."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_qwen import make_tokenizer, third_party

from igrpo_algo.drafts.splice import TextSplice, TokenBudget
from igrpo_algo.drafts.text import DraftTemplate
from igrpo_algo.trainers.trl import IGRPOConfig
from igrpo_algo.trainers.trl.drafts import (
    DraftLayout,
    choose_drafts,
    splice_or_leave,
)

pytestmark = third_party
NAN = float("nan")


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


def choose(
    scores: list[list[float]], lengths: list[list[int]] | None = None, **options: Any
) -> Any:
    args = IGRPOConfig("out", bf16=False, report_to="none", **options)
    values = torch.tensor(scores)
    sizes = torch.ones(values.shape, dtype=torch.long) if lengths is None else torch.tensor(lengths)
    return choose_drafts(values, sizes, args, torch.Generator().manual_seed(0), drop=True)


def test_choice_by_score_then_by_the_rule_for_ties() -> None:
    scores = [[0.0, 2.0, 2.0], [NAN, 0.5, 0.2], [NAN, NAN, NAN]]
    choice = choose(scores)
    assert choice.draft.tolist() == [1, 1, -1]
    assert choice.right.tolist() == [True, False, False]
    assert choice.plain.tolist() == [False, False, True]
    assert choice.skipped.tolist() == [False] * 3
    torch.testing.assert_close(choice.best, torch.tensor([2.0, 0.5, NAN]), equal_nan=True)
    lengths = [[1, 5, 3], [1, 1, 1], [1, 1, 1]]
    assert choose(scores, lengths, draft_ties="shortest").draft.tolist() == [2, 1, -1]


@pytest.mark.parametrize(
    ("rule", "plain", "skipped"),
    [
        ("condition", [False, False, True], [False, False, False]),
        ("plain_prompt", [False, True, True], [False, False, False]),
        ("skip", [False, True, True], [False, True, True]),
    ],
)
def test_choice_where_all_failed(rule: str, plain: list[bool], skipped: list[bool]) -> None:
    scores = [[0.0, 1.0], [0.9, 0.2], [NAN, NAN]]
    choice = choose(scores, all_drafts_failed=rule)
    assert (choice.plain.tolist(), choice.skipped.tolist()) == (plain, skipped)
    lenient = choose(scores, all_drafts_failed=rule, success_reward=0.9)
    assert lenient.right.tolist() == [True, True, False]


def test_controls_are_judged_by_the_best_draft() -> None:
    scores = [[0.0, 1.0, NAN], [0.0, 0.0, 0.0]]
    worst = choose(scores, draft_choice="worst", all_drafts_failed="plain_prompt")
    assert worst.draft.tolist() == [0, 0]
    assert worst.right.tolist() == [True, False]
    assert worst.plain.tolist() == [False, True]
    drawn = [choose(scores * 32, draft_choice="random").draft[0::2].tolist() for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {0, 1}


def test_dropout_at_its_ends_and_in_evaluation() -> None:
    scores = [[0.0, 1.0]] * 16
    assert choose(scores, draft_dropout=1.0).plain.all()
    assert not choose(scores, draft_dropout=0.0).plain.any()
    args = IGRPOConfig("out", bf16=False, report_to="none", draft_dropout=1.0)
    lengths = torch.ones(16, 2, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    evaluated = choose_drafts(torch.tensor(scores), lengths, args, generator, drop=False)
    assert not evaluated.plain.any()


TOKENIZER = make_tokenizer()
TEMPLATE = DraftTemplate("[", "]", ("[", "]"))


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=40)
@given(
    st.text("ab1[]", min_size=0, max_size=12),
    st.one_of(st.none(), st.integers(1, 12)),
    st.one_of(st.none(), st.integers(1, 40)),
    st.sampled_from(["tail", "head"]),
)
def test_splicing_keeps_the_question_and_both_limits(
    draft: str, max_draft: int | None, max_prompt: int | None, keep: Any
) -> None:
    budget = None
    if max_draft or max_prompt:
        budget = TokenBudget(TOKENIZER, max_draft, max_prompt, keep)
    splice = TextSplice(TEMPLATE, None, ("<s>", "</s>"), budget)
    question = [{"role": "user", "content": "1+1?"}]
    refined = splice_or_leave(question, ids_of(draft), splice, TOKENIZER)
    count = len(TokenBudget(TOKENIZER, 1).encode_prompt(refined.prompt))
    plain = len(TokenBudget(TOKENIZER, 1).encode_prompt(question))
    if refined.draft is None:
        assert refined.prompt == question
        assert (refined.draft_ids, refined.length) == (None, 0)
        return
    assert refined.draft_ids == ids_of(draft)
    content = refined.prompt[0]["content"]
    assert content.startswith("1+1?[")
    assert content.endswith("]")
    assert count <= (max_prompt or 10**6)
    assert refined.length <= (max_draft or 10**6)
    assert count <= plain + 2 + refined.length
    if refined.cut and "[" not in draft and "]" not in draft:
        kept = draft[refined.cut :] if keep == "tail" else draft[: len(draft) - refined.cut]
        assert content == f"1+1?[{kept}]"


def test_a_question_without_room_stays_plain_and_whole() -> None:
    splice = TextSplice(TEMPLATE, None, (), TokenBudget(TOKENIZER, None, 8))
    refined = splice_or_leave("a question of many tokens", ids_of("draft"), splice, TOKENIZER)
    assert refined == ("a question of many tokens", None, None, 0, 5)
