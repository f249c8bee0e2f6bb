"""Answers as models and data sets state them, and their spelling."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_algo.rewards.answers import (
    completion_text,
    extract_answer,
    extract_gold,
    normalize_answer,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So $x = \boxed{7}$.", "7"),
        (r"\boxed{\frac{3}{\sqrt{2}}}", r"\frac{3}{\sqrt{2}}"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{2} but \boxed{3", None),
        (r"\boxed{2} but \boxed{}", None),
        (r"\boxed{2} but \boxed", None),
        (r"The answer is 2: \boxed{3", None),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\text{a\}b}}", r"\text{a\}b}"),
        (r"{ stray \boxed{5} } }", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{9}", "9"),
        (r"$\boxed 5$", "5"),
        ("4 + 4 = 8\n#### 8", "8"),
        ("#### 1\nno, wait\n#### 1,024\nThat is all.", "1,024"),
        ("The final answer is 12. I hope it is correct.", "12"),
        ("Answer: 3.5 m", "3.5 m"),
        ("the answer is 1, no, the answer is 2", "2"),
        ("**Answer:** 42", "42"),
        ("**Answer**: 42", "42"),
        ("**Answer: 42**", "42"),
        ("The answer is **42**.", "42"),
        ("The answer is\n42", "42"),
        ("The answer is:\n\n**42**\n", "42"),
        (r"\boxed{1} #### 2 and the answer is 3", "1"),
        ("<think>\\boxed{1}</think>I forgot.", None),
        ("<think>no</think><answer>x = 4</answer>", "x = 4"),
        (r"<answer>1</answer> then <answer>it is \boxed{2}</answer>", "2"),
        ("<answer>1", None),
        ("<answer>1</answer><answer>2", None),
        ("<think>It is \\boxed{1}, but", None),
        ("\\boxed{1} <think>or 2", None),
        ("<think>1</think><think>The answer is 2</think>#### 3", "3"),
        ("The answer is $x = 3$, so we are done.", "$x = 3$"),
        ("The answer to the first part is 4.", "4"),
        ("Answer\uff1a42", "42"),
        ("**Final Answer**\n\n73", "73"),
        ("#### Answer\n\n$$\n73\n$$", "73"),
        ("The answer is:\n\\[\n73\n\\]\nas required", "73"),
        ("#### 42, as computed", "42"),
        ("#### St. Louis", "St. Louis"),
        ("<answer>42 (in total)</answer>", "42"),
        ("answer </answer> before <answer>", None),
        ("", None),
        ("I can't tell.", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_extract_gold_reads_cells() -> None:
    assert extract_gold("Tom has 3 + 4 = <<3+4=7>>7 pens.\n#### 7") == "7"
    assert extract_gold(r"Adding gives $\boxed{\frac{7}{2}}$.") == r"\frac{7}{2}"
    assert [extract_gold(v) for v in (None, "", "  ", 7, 2.5, "x+1")] == [
        None, None, None, "7", "2.5", "x+1",
    ]  # fmt: skip
    assert extract_gold(float("nan")) is None
    with pytest.raises(TypeError, match="answer must be a string, a number or None, got list"):
        extract_gold([1])
    with pytest.raises(TypeError, match="got bool True"):
        extract_gold(True)
    assert extract_gold(10**30) == "1" + "0" * 30
    assert extract_gold(1e308) == "1e+308"
    assert [extract_gold(v) for v in (7.0, -3.0, 0.5, 1e16)] == ["7", "-3", "0.5", "1e+16"]
    with pytest.raises(ValueError, match=r"solution\[2\] must have at most 4,300 digits"):
        extract_gold(10**5000, name="solution[2]")
    with pytest.raises(ValueError, match="answer must be finite as a number, got -inf"):
        extract_gold(float("-inf"))


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        (" $42$ ", "42"),
        (r"\(42\)", "42"),
        ("**42**.", "42"),
        (r"**\(42\)**", "42"),
        ("$$42$$", "42"),
        ("1,234,567", "1234567"),
        ("1{,}234", "1234"),
        (r"1\!,\!234", "1234"),
        (r"\$18", "18"),
        ("$18", "18"),
        ("€5.50", "5.50"),
        ("1,800 dollars", "1800 dollars"),
        ("60 km/h", "60 km/h"),
        ("1e3", "1*10^{3}"),
        ("-2.5E-07", "-2.5*10^{-7}"),
        ("3 million", "3 million"),
        ("2 pi", r"2 \pi"),
        ("2x", "2x"),
        ("1,23", "1,23"),
        ("1, 2", "1, 2"),
        (r"\text{(C)}", "C"),
        (r"\text{red}", "red"),
        (r"5\text{ cm}", "5 cm"),
        (r"1,005~\mathrm{cm}^{2}", "1005 cm^{2}"),
        (r"5\text{ or }6", "5 or 6"),
        ("+", "+"),
        ("", ""),
        ("$a$ and $b$", "a and b"),
    ],
)
def test_normalize_answer(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized


@given(st.text(alphabet="0123456789,.$ \\{}()abtex*+-/!%", max_size=30))
@settings(deadline=None, max_examples=200)
def test_normalize_is_idempotent_and_gold_reads_its_own_box(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once
    number = f"{len(text) * 1234567:,}"
    assert extract_answer(f"text {number} \\boxed{{{number}}}") == number


def test_completion_text() -> None:
    blocks = [{"type": "text", "text": "4"}, {"type": "image"}, {"type": "text", "text": "2"}]
    assert completion_text([{"role": "assistant", "content": blocks}]) == "42"
    turns = [{"role": "assistant", "content": "1"}, {"role": "assistant", "content": "2"}]
    assert completion_text(turns) == "2"
    for bad in ([], 3, [{"role": "assistant"}], [{"content": None}]):
        with pytest.raises(TypeError, match="completion must be a string or a list of messages"):
            completion_text(bad)
