"""Drafts as token ids: which end is kept, and that a question never loses a token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_algo.drafts.token_ids import draft_budget, splice_prompt_ids, truncate_draft

IDS = st.lists(st.integers(0, 9), max_size=8)


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 14))
@settings(max_examples=50)
def test_truncate_keeps_one_end(ids, max_tokens):
    size = min(len(ids), max_tokens)
    tail = truncate_draft(ids, max_tokens)
    head = truncate_draft(ids, max_tokens, keep="head")
    assert len(tail) == len(head) == size
    assert ids[:size] == head
    assert ids[len(ids) - size :] == tail
    tensor = torch.tensor(ids, dtype=torch.int64)
    assert truncate_draft(tensor, max_tokens).tolist() == tail
    assert truncate_draft(tensor, max_tokens, keep="head").tolist() == head


def test_truncate_returns_the_type_it_was_given():
    ids = [5, 6, 7]
    assert truncate_draft(ids, 3) == ids
    assert truncate_draft(ids, 3) is not ids
    assert truncate_draft(ids, 0) == []
    cut = truncate_draft(torch.tensor(ids, dtype=torch.int32), 2)
    assert cut.dtype == torch.int32
    assert cut.tolist() == [6, 7]


@pytest.mark.parametrize(
    ("ids", "max_tokens", "keep", "error", "message"),
    [
        ("abc", 1, "tail", TypeError, r"draft_ids must be a list, got str 'abc'"),
        (torch.ones(2), 1, "tail", TypeError, r"draft_ids must be an integer tensor"),
        (torch.ones(1, 2, dtype=torch.int64), 1, "tail", ValueError, r"draft_ids must have shape"),
        ([1], -1, "tail", ValueError, r"max_tokens must be >= 0, got -1"),
        ([1], 1.0, "tail", TypeError, r"max_tokens must be an int, got float 1.0"),
        ([1], 1, "middle", ValueError, r"keep must be 'tail' or 'head', got str 'middle'"),
    ],
)
def test_bad_truncation(ids, max_tokens, keep, error, message):
    with pytest.raises(error, match=message):
        truncate_draft(ids, max_tokens, keep=keep)


@given(IDS, IDS, IDS, IDS, st.integers(0, 10), st.sampled_from(["tail", "head"]))
@settings(max_examples=50)
def test_ids_cut_the_draft_and_nothing_else(prompt, draft, before, after, room, keep):
    size = min(room, len(draft))
    kept = draft[len(draft) - size :] if keep == "tail" else draft[:size]
    spliced = splice_prompt_ids(
        prompt,
        draft,
        before_ids=before,
        after_ids=after,
        max_prompt_tokens=len(prompt + before + after) + room,
        keep=keep,
    )
    assert spliced == prompt + before + kept + after


def test_ids_without_a_limit_keep_the_whole_draft():
    assert splice_prompt_ids([1], [2, 3], before_ids=[8], after_ids=[9]) == [1, 8, 2, 3, 9]


def test_special_ids_leave_the_draft_alone_and_take_no_room():
    spliced = splice_prompt_ids(
        [0, 1], [5, 0, 6, 0], after_ids=[0], special_ids=[0], max_prompt_tokens=5
    )
    assert spliced == [0, 1, 5, 6, 0]


@pytest.mark.parametrize("name", ["prompt_ids", "draft_ids", "before_ids", "after_ids"])
def test_ids_as_a_tensor_are_refused(name):
    ids = {"prompt_ids": [1], "draft_ids": [2], name: torch.tensor([1, 2])}
    with pytest.raises(TypeError, match=rf"{name} must be a list, got a int64 tensor"):
        splice_prompt_ids(**ids)


def test_bad_limits_for_ids():
    with pytest.raises(ValueError, match=r"3 tokens of question and 2 of bridge .* into 4"):
        splice_prompt_ids([1, 2, 3], [], before_ids=[4], after_ids=[5], max_prompt_tokens=4)
    with pytest.raises(ValueError, match=r"keep must be 'tail' or 'head'"):
        splice_prompt_ids([1], [2], keep="both")
    with pytest.raises(TypeError, match=r"max_prompt_tokens must be an int"):
        splice_prompt_ids([1], [2], max_prompt_tokens=4.0)


def test_budget_by_hand():
    assert draft_budget(1024, 200, 60) == 764
    assert draft_budget(10, 6, 4) == 0
    assert draft_budget(10, 6) == 4


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((10, 7, 4), ValueError, r"7 tokens of question and 4 of bridge do not fit into 10"),
        ((-1, 0, 0), ValueError, r"max_prompt_tokens must be >= 0, got -1"),
        ((1, -1, 0), ValueError, r"question_tokens must be >= 0, got -1"),
        ((1, 0, -1), ValueError, r"bridge_tokens must be >= 0, got -1"),
        ((1, 0.5, 0), TypeError, r"question_tokens must be an int, got float"),
    ],
)
def test_bad_budgets(sizes, error, message):
    with pytest.raises(error, match=message):
        draft_budget(*sizes)
