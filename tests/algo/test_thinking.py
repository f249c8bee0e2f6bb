"""What is left of a completion without its thinking."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_algo.rewards import math_reward
from igrpo_algo.thinking import MARK_TOKENS, THINKING_MARKS, strip_thinking, text_after_thinking


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>a</think>\n\nIt is 5.", "It is 5."),
        ("It is 5.", "It is 5."),
        ("", ""),
        ("a</think> b", "b"),  # thinking opened in the prompt
        ("<think>a", ""),  # cut off while thinking
        ("5 <think>a</think>= 5 <think>b", "5 = 5"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("<think>a<think>b</think>c</think>d", "d"),  # nested: all up to the last close
        ("<think>a</think>b</think>c", "c"),
        ("<think></think>", ""),
        ("a <think> b </think", "a"),  # half a mark closes nothing
    ],
)
def test_strip_thinking_by_hand(text, answer):
    assert strip_thinking(text) == answer


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", " b", "\n"]), max_size=12))
@settings(max_examples=50)
def test_strip_thinking_agrees_with_a_walk_over_the_marks(pieces):
    answer, thinking = "", False
    for piece in pieces:
        if piece == "<think>":
            thinking = True
        elif piece == "</think>":
            answer, thinking = (answer if thinking else ""), False
        elif not thinking:
            answer += piece
    assert strip_thinking("".join(pieces)) == answer.strip()


def test_strip_thinking_with_other_marks():
    assert strip_thinking("[T]a[/T] b", open="[T]", close="[/T]") == "b"


@pytest.mark.parametrize(("opened", "closed"), THINKING_MARKS)
def test_every_way_of_marking_thinking(opened, closed):
    whole, cut = rf"{opened}\boxed{{3}}?{closed}\boxed{{4}}", rf"Hm. {opened}So \boxed{{4}}"
    started_before = rf"\boxed{{3}}?{closed}\boxed{{4}}"
    for text in (whole, started_before):
        assert strip_thinking(text) == text_after_thinking(text) == r"\boxed{4}"
    assert (strip_thinking(cut), text_after_thinking(cut)) == ("Hm.", None)
    assert math_reward([whole, cut, started_before], answer=["4"] * 3) == [1.0, 0.0, 1.0]


def test_what_was_said_before_more_thinking_does_not_count():
    text = r"\boxed{3} <think>No.</think>\boxed{4}"
    assert text_after_thinking(text) == r"\boxed{4}"
    assert strip_thinking(text) == r"\boxed{3} \boxed{4}"
    assert text_after_thinking("<think>a</think>b<think>c</think>d") == "d"
    assert text_after_thinking("It is 5.") == "It is 5."


def test_marks_of_several_tokens_are_known_by_their_tokens():
    assert {"<think>", "[/THINK]", "<|channel>", "<channel|>"} <= MARK_TOKENS
    assert {"<|channel|>", "<|message|>"} <= MARK_TOKENS


def test_bad_marks():
    with pytest.raises(TypeError, match=r"text must be a str"):
        strip_thinking(None)
    with pytest.raises(TypeError, match=r"close must be a str"):
        strip_thinking("a", close=1)
    for marks in ({"open": ""}, {"close": "[/T]"}, {"open": "[T]"}, {"open": "T", "close": "T"}):
        with pytest.raises(ValueError, match=r"open and close must be two different marks"):
            strip_thinking("a", **marks)
