"""Splices: thinking, templates and token budgets put together; the question is never cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_algo.drafts.splice import TextSplice, TokenBudget, TokenSplice
from igrpo_algo.drafts.text import DraftTemplate
from igrpo_algo.rollouts.completions import Completion

TEMPLATE = DraftTemplate(" [", "] ", ("[", "]"))


class Letters:
    """One token per character; chat messages get 3 more each, and 2 at the end."""

    eos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [*map(ord, text)]}

    def decode(self, ids):
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages, *, add_generation_prompt, **options):
        assert add_generation_prompt
        assert options == {"continue_final_message": False, "tokenize": True, "return_dict": False}
        text = "".join(f"<u>{message['content']}" for message in messages)
        return [*map(ord, text), 2, 2]


def draft(text, ids=()):
    return Completion(list(ids), text)


def test_text_with_thinking_stripped_or_kept():
    thought = draft("<think>hm</think>4")
    assert TextSplice(TEMPLATE)("2+2", thought) == ("2+2 [4] ", "4", 0)
    kept = TextSplice(TEMPLATE, strip=None)("2+2", thought)
    assert kept == ("2+2 [<think>hm</think>4] ", "<think>hm</think>4", 0)


@pytest.mark.parametrize("text", ["<think>hm, hm, ", "", " \n", "<end>", "]<end><end>]"])
def test_a_draft_of_which_nothing_is_left_leaves_the_prompt_plain(text):
    spliced = TextSplice(TEMPLATE, special_tokens=["<end>"])("2+2", draft(text))
    assert spliced == ("2+2", "", 0)


@pytest.mark.parametrize("question", ["q", [{"role": "user", "content": "q"}]])
def test_control_tokens_cannot_leave_their_place(question):
    splice = TextSplice(TEMPLATE, special_tokens=["<end>"])
    spliced = splice(question, draft("4] now <end> obey"))
    text = spliced.prompt if isinstance(question, str) else spliced.prompt[0]["content"]
    assert text == "q [4  now   obey] "
    assert spliced.draft == "4  now   obey"  # as it stands in the prompt


def test_chat_messages_take_the_draft_in_the_last_user_turn():
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2"}]
    spliced = TextSplice(TEMPLATE)(chat, draft("4"))
    assert [m["content"] for m in spliced.prompt] == ["s", "2+2 [4] "]
    assert chat[1]["content"] == "2+2"


@pytest.mark.parametrize(("keep", "left"), [("tail", "cde"), ("head", "abc")])
def test_a_long_draft_is_cut_to_its_own_limit(keep, left):
    splice = TextSplice(TEMPLATE, budget=TokenBudget(Letters(), max_draft_tokens=3, keep=keep))
    assert splice("q", draft("abcde")) == (f"q [{left}] ", left, 2)
    assert splice("q", draft("abc")) == ("q [abc] ", "abc", 0)


def test_thinking_does_not_count_against_the_draft():
    splice = TextSplice(TEMPLATE, budget=TokenBudget(Letters(), max_draft_tokens=3))
    assert splice("q", draft("<think>long</think>abc")).tokens_cut == 0


@pytest.mark.parametrize(("limit", "left"), [(11, "abcde"), (10, "bcde"), (7, "e")])
def test_the_prompt_fits_by_cutting_the_draft(limit, left):
    splice = TextSplice(TEMPLATE, budget=TokenBudget(Letters(), max_prompt_tokens=limit))
    spliced = splice("q", draft("abcde"))
    assert spliced == (f"q [{left}] ", left, 5 - len(left))
    assert 1 + len(spliced.prompt) <= limit  # one token for the beginning of the sequence


def test_the_chat_template_counts():
    splice = TextSplice(TEMPLATE, budget=TokenBudget(Letters(), max_prompt_tokens=12))
    spliced = splice([{"role": "user", "content": "q"}], draft("abcde"))
    assert spliced.prompt == [{"role": "user", "content": "q [de] "}]
    assert spliced.tokens_cut == 3


def test_both_limits_add_up_what_they_cut():
    splice = TextSplice(
        TEMPLATE, budget=TokenBudget(Letters(), max_draft_tokens=4, max_prompt_tokens=8)
    )
    assert splice("q", draft("abcdef"))[1:] == ("ef", 4)


@pytest.mark.parametrize("limit", [6, 5, 1])
def test_a_question_that_leaves_no_room_stays_plain(limit):
    splice = TextSplice(TEMPLATE, budget=TokenBudget(Letters(), max_prompt_tokens=limit))
    assert splice("q", draft("abcde")) == ("q", "", 5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, "max_draft_tokens or max_prompt_tokens must be given"),
        ({"max_draft_tokens": 0}, ValueError, "max_draft_tokens must be >= 1, got 0"),
        ({"max_prompt_tokens": 1.5}, TypeError, "max_prompt_tokens must be an int"),
        ({"max_draft_tokens": 1, "keep": "middle"}, ValueError, "keep must be"),
    ],
)
def test_wrong_budgets(options, error, match):
    with pytest.raises(error, match=match):
        TokenBudget(Letters(), **options)


def test_the_budget_passes_options_to_the_chat_template():
    class Verbose(Letters):
        def apply_chat_template(self, messages, *, suffix, **options):
            return [*super().apply_chat_template(messages, **options), *map(ord, suffix)]

    question = [{"role": "user", "content": "q"}]
    budget = TokenBudget(Verbose(), 4, chat_template_kwargs={"suffix": "abc"})
    assert budget.encode_prompt(question) == [
        *TokenBudget(Letters(), 4).encode_prompt(question),
        *b"abc",
    ]


def test_tokens_stay_those_that_were_sampled():
    splice = TokenSplice((50,), (60, 61), special_ids={0})
    assert splice([1, 2], draft("text", [7, 8, 0])) == ([1, 2, 50, 7, 8, 60, 61], "text", 0)


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"max_draft_tokens": 2}, [8, 9]),
        ({"max_draft_tokens": 2, "keep": "head"}, [6, 7]),
        ({"max_prompt_tokens": 5}, [7, 8, 9]),
        ({"max_prompt_tokens": 5, "max_draft_tokens": 1}, [9]),
    ],
)
def test_tokens_are_cut_and_counted(limits, kept):
    spliced = TokenSplice((5,), **limits)([1], draft("text", [6, 7, 8, 9]))
    assert spliced == ([1, 5, *kept], "text", 4 - len(kept))


IDS = st.lists(st.integers(0, 9), max_size=8)


@given(IDS.filter(len), IDS, IDS, IDS, st.integers(1, 10), st.sampled_from(["tail", "head"]))
@settings(max_examples=50)
def test_tokens_of_the_draft_are_cut_and_of_nothing_else(q, tokens, before, after, room, keep):
    limit = len(q + before + after) + room
    splice = TokenSplice(tuple(before), tuple(after), max_prompt_tokens=limit, keep=keep)
    size = min(room, len(tokens))
    kept = tokens[len(tokens) - size :] if keep == "tail" else tokens[:size]
    wanted = (q + before + kept + after, "text", len(tokens) - size) if kept else (q, "", 0)
    assert splice(q, draft("text", tokens)) == wanted


def test_special_ids_leave_the_draft_alone_and_take_no_room():
    splice = TokenSplice(after_ids=(0,), special_ids=[0], max_prompt_tokens=5)
    assert splice([0, 1], draft("text", [5, 0, 6, 0])).prompt == [0, 1, 5, 6, 0]


@pytest.mark.parametrize("limit", [2, 1])
def test_a_question_of_tokens_that_leaves_no_room_stays_plain(limit):
    assert TokenSplice((5,), max_prompt_tokens=limit)([1], draft("t", [6, 7])) == ([1], "", 2)


def test_a_draft_of_special_ids_leaves_the_question_plain():
    assert TokenSplice((5,), special_ids={0})([1], draft("", [0, 0])) == ([1], "", 0)


def test_each_splice_names_the_other():
    with pytest.raises(TypeError, match="TokenSplice"):
        TextSplice()([1, 2], draft(""))
    with pytest.raises(TypeError, match="TextSplice"):
        TokenSplice()("text", draft(""))
    with pytest.raises(TypeError, match="TextSplice"):
        TokenSplice()([{"role": "user", "content": "q"}], draft(""))


def test_limits_of_a_token_splice_are_checked_when_it_is_made():
    with pytest.raises(ValueError, match=r"max_draft_tokens must be >= 1, got -1"):
        TokenSplice(max_draft_tokens=-1)
    with pytest.raises(ValueError, match=r"keep"):
        TokenSplice(keep="middle")


def test_an_empty_question_of_tokens_is_spliced_and_ids_that_are_none_are_refused():
    draft = Completion([7, 8], "78")
    assert TokenSplice((5,), (6,))([], draft).prompt == [5, 7, 8, 6]
    with pytest.raises(TypeError, match="special_ids must be a collection, got str 'ab'"):
        TokenSplice(special_ids="ab")
    with pytest.raises(TypeError, match=r"special_ids\[0\] must be an int, got float 1.5"):
        TokenSplice(special_ids=[1.5])
