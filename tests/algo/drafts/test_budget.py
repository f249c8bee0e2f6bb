import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_algo.drafts.budget import fit_draft, truncate_draft
from igrpo_algo.drafts.text import CONCATENATION, splice_prompt

QUESTION = "1 + 1?"


def encode(text: str) -> list[int]:
    """Bytes, in which a pair "ab" is one token: shorter text may hold more tokens."""
    return [*text.replace("ab", "\x01").encode()]


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace").replace("\x01", "ab")


class Renderer:
    """A chat template and a tokenizer in one line, that counts its calls."""

    def __init__(self, question: str = QUESTION):
        self.question = question
        self.calls = 0

    def __call__(self, draft: str) -> list[int]:
        self.calls += 1
        return encode(f"U:{splice_prompt(self.question, draft, template=CONCATENATION)};A:")


BARE = len(Renderer()(""))


def test_a_draft_that_fits_is_left_alone_and_rendered_once():
    render = Renderer()
    fitted = fit_draft(
        "so 2", render, encode=encode, decode=decode, max_prompt_tokens=len(Renderer()("so 2"))
    )
    assert fitted == ("so 2", Renderer()("so 2"), 0)
    assert render.calls == 1


@pytest.mark.parametrize(("keep", "left"), [("tail", "it is 2"), ("head", "so it i")])
def test_a_long_draft_is_cut_to_the_budget_in_three_renders(keep, left):
    render = Renderer()
    fitted = fit_draft(
        "so it is 2",
        render,
        encode=encode,
        decode=decode,
        max_prompt_tokens=BARE + 7,
        keep=keep,
    )
    assert fitted == (left, Renderer()(left), 3)
    assert len(fitted.prompt_ids) == BARE + 7
    assert render.calls == 3


@given(
    st.text(st.sampled_from("ab é😀?"), max_size=30),
    st.text(st.sampled_from("ab é"), min_size=1, max_size=8),
    st.integers(0, 40),
    st.sampled_from(["tail", "head"]),
)
@settings(max_examples=50)
def test_the_question_stays_whole_and_the_prompt_fits(draft, question, room, keep):
    render = Renderer(question)
    max_prompt_tokens = len(render("")) + room
    fitted = fit_draft(
        draft,
        render,
        encode=encode,
        decode=decode,
        max_prompt_tokens=max_prompt_tokens,
        keep=keep,
    )
    assert fitted.prompt_ids == render(fitted.draft)
    assert len(fitted.prompt_ids) <= max_prompt_tokens
    assert decode(fitted.prompt_ids).startswith(f"U:{question}\n\n")
    whole = draft.endswith if keep == "tail" else draft.startswith
    assert whole(fitted.draft)  # no half of a character, nothing from the middle
    if len(render(draft)) <= max_prompt_tokens:
        assert fitted.draft == draft
    else:
        assert 0 < fitted.tokens_cut <= len(encode(draft))


def test_what_rendering_adds_is_taken_off_the_draft():
    def ending(draft: str) -> list[int]:
        return encode(QUESTION + draft + "!" * bool(draft))

    fitted = fit_draft(
        "abcdef" * 5, ending, encode=encode, decode=decode, max_prompt_tokens=len(QUESTION) + 9
    )
    left = "defabcdef"  # d e f ab c d e f: one token of the nine goes to the "!"
    assert fitted == (left, encode(f"{QUESTION}{left}!"), 25 - 8)


@pytest.mark.parametrize("missing", [0, 1, 99])
@pytest.mark.parametrize("size", [1, 3])
def test_without_room_the_draft_comes_back_empty(size, missing):
    fitted = fit_draft(
        "😀" * size,
        Renderer(),
        encode=encode,
        decode=decode,
        max_prompt_tokens=max(0, BARE - missing),
    )
    assert fitted == ("", Renderer()(""), 4 * size)


def test_half_a_character_is_dropped():
    fitted = fit_draft("😀!", Renderer(), encode=encode, decode=decode, max_prompt_tokens=BARE + 3)
    assert fitted.draft == "!"
    assert fitted.tokens_cut == 2


def test_bad_fits():
    options = {"encode": encode, "decode": decode}
    with pytest.raises(ValueError, match=r"max_prompt_tokens must be >= 0, got -1"):
        fit_draft("so it is 2", Renderer(), max_prompt_tokens=-1, **options)
    with pytest.raises(ValueError, match=r"keep must be 'tail' or 'head', got str 'both'"):
        fit_draft("", Renderer(), max_prompt_tokens=99, keep="both", **options)
    with pytest.raises(TypeError, match=r"max_prompt_tokens must be an int, got float"):
        fit_draft("", Renderer(), max_prompt_tokens=9.0, **options)


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
