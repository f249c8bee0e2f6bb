"""Rewards that compare with a reference, on pairs as models and data sets write them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from igrpo_algo.rewards import exact_match_reward, math_reward
from igrpo_algo.rewards.matching import read_base, split_choice

PAIRS = [
    json.loads(line)
    for line in Path(__file__).with_name("math_answers.jsonl").read_text("utf-8").splitlines()
]


@pytest.mark.parametrize("kind", sorted({pair["kind"] for pair in PAIRS}))
def test_pairs_that_graders_get_wrong(kind: str) -> None:
    pairs = [pair for pair in PAIRS if pair["kind"] == kind]
    scores = math_reward(
        [pair["completion"] for pair in pairs], answer=[pair["answer"] for pair in pairs]
    )
    wrong = [
        (pair["completion"], pair["answer"], score)
        for pair, score in zip(pairs, scores, strict=True)
        if score != pair["right"]
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "solution",
    [
        "We multiply 6 by 7. Each of the 6 rows has 7 trees, so the total is 42 trees.",
        "We compute 6*7, so the total is 42.",
        "6*7 = 42, hence the total is 42.",
        "Since 6 rows of 7 trees stand there, 6*7=42.",
        "Adding, 20+22=42.",
        "6 boxes with 7 pens each make 42 pens.",
        "The triangle is isosceles.",
    ],
)
def test_a_worked_solution_without_a_mark_is_unscored(solution: str) -> None:
    assert math_reward([r"\boxed{42}", r"\boxed{41}", ""], solution=[solution] * 3) == [None] * 3
    assert math_reward(["#### 42"], solution=[solution + "\n#### 42"]) == [1.0]


def test_the_other_column_serves_where_one_is_empty() -> None:
    completions = ["#### 1", "#### 2", "#### 3", "#### 4"]
    answers, solutions = [None, "2", " ", float("nan")], [r"\boxed{1}", r"\boxed{5}", "3", None]
    scores = [1.0, 1.0, 1.0, None]
    assert math_reward(completions, answer=answers, solution=solutions) == scores
    assert exact_match_reward(completions, answer=answers, solution=solutions) == scores


def test_large_numbers_as_references() -> None:
    completions = [r"\boxed{10^{30}}", r"\boxed{10^{308}}", r"\boxed{10^{30} + 1}"]
    assert math_reward(completions, answer=[10**30, 1e308, 10**30]) == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"answer\[1\] must have at most 4,300 digits"):
        math_reward(["1", "1"], answer=[1, 10**5000])


def test_split_choice() -> None:
    assert split_choice("(B) 5") == split_choice("B) 5") == split_choice("B: 5") == ("B", "5")
    assert split_choice(r"(B) \frac12") == ("B", r"\frac12")
    for answer in ("B", "(B, 5)", "(b) 5", "(A) 5 (B) 6", "(A) or (B)"):
        assert split_choice(answer) == ("", answer)


def test_read_base() -> None:
    assert read_base("(101)_2") == read_base("101_{2}") == (2, 5)
    assert read_base("2A_{16}") == read_base("2a_{16}") == (16, 42)
    assert read_base("52", default=8) == (8, 42)
    assert read_base("-7") == (10, -7)
    for answer, base in (("58_8", 8), ("7_1", 1), ("7_{99}", 99)):
        assert read_base(answer) == (base, None)
    assert read_base("x_2") == read_base("1/2") == (10, None)


@pytest.mark.parametrize(
    ("completion", "gold", "score"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{\dfrac{2}{4}}", "1/2", 1.0),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1.0),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        (r"\boxed{2c}", "2", 0.0),
        (r"\boxed{2m}", "2", 0.0),
        (r"\boxed{1/2 \text{ km}}", "1/2 m", 0.0),
        (r"\boxed{1/2 \text{ km}}", "0.5", 1.0),
        (r"\boxed{72.0 \text{ clips}}", "72 clips", 1.0),
        (r"\boxed{20^\circ\text{C}}", "20 °F", 0.0),
        (r"\boxed{1,234}", "1234", 1.0),
        (r"\boxed{1234.0}", "#### 1,234", 1.0),
        ("#### $18", "She sells 9 * 2 = 18.\n#### 18", 1.0),
        ("The answer is 72 dollars.", "72", 1.0),
        ("The answer is 72 clips.", "72 clips", 1.0),
        ("The answer is 72 clips.", "72", 0.0),
        (r"\boxed{5\text{ cm}}", "5", 1.0),
        (r"\boxed{5}", "5 cm", 1.0),
        (r"\boxed{5.0 centimeters}", r"5\text{ cm}", 1.0),
        (r"\boxed{5 km}", "5 m", 0.0),
        (r"\boxed{\sqrt{5}\text{ km}}", r"\sqrt{5}\text{ m}", 0.0),
        (r"\boxed{2 minutes}", "2 hours", 0.0),
        (r"\boxed{8 pm}", "8 am", 0.0),
        (r"\boxed{2 thirds}", "2", 0.0),
        (r"\boxed{2\text{ thirds}}", "2", 0.0),
        (r"\boxed{\frac{1}{2}\text{ thirds}}", "1/2", 0.0),
        (r"\boxed{2}", "2 thirds", 0.0),
        (r"\boxed{1 half}", "1", 0.0),
        (r"\boxed{4 squared}", "4", 0.0),
        (r"\boxed{5 less than x}", "5", 0.0),
        (r"\boxed{no}", "on", 0.0),
        (r"\boxed{No}", "no", 1.0),
        (r"\boxed{yx}", "xy", 1.0),
        (r"\boxed{nm}", "mn", 1.0),
        (r"\boxed{7}", float("nan"), None),
        ("**Answer:** 42", "42", 1.0),
        (r"\boxed{1e3}", "1000", 1.0),
        (r"\boxed{1000}", 1e3, 1.0),
        (r"\boxed{0.00001}", 1e-5, 1.0),
        (r"\boxed{\textbf{(B)}\ 5}", "B", 1.0),
        (r"\boxed{\textbf{(C)}\ 5}", "B", 0.0),
        (r"\boxed{\textbf{(B)}\ 5}", "5", 1.0),
        (r"\boxed{B}", r"\textbf{(B)}\ 5", 1.0),
        (r"\boxed{5}", r"\textbf{(B)}\ 5", 1.0),
        (r"\boxed{(C) 5}", r"\textbf{(B)}\ 5", 0.0),
        (r"\boxed{50\%}", "50", 1.0),
        (r"\boxed{50\%}", "0.5", 1.0),
        (r"\boxed{12.5\%}", "12.5", 1.0),
        (r"\boxed{33.3}", r"33.3\%", 1.0),
        (r"\boxed{\frac{1}{3}\%}", "1/3", 1.0),
        (r"\boxed{-5.5\%}", "-5.5", 1.0),
        (r"\boxed{12.5\%}", "12.4", 0.0),
        (r"\boxed{12.5\%}", r"1250\%", 0.0),
        (r"\boxed{0.00001\%}", "0.00002", 0.0),
        (r"\boxed{3:4}", "3/4", 1.0),
        (r"\boxed{b}", "B", 1.0),
        (r"\boxed{(1, 2)}", "(1,2)", 1.0),
        (r"\boxed{(2, 1)}", "(1,2)", 0.0),
        (r"\boxed{\text{(B)}}", r"\text{(B)}", 1.0),
        (r"\boxed{Anna}", r"\text{anna}", 1.0),
        (r"\boxed{annA}", "nana", 0.0),
        (r"\boxed{7}", "8", 0.0),
        (r"\boxed{-7}", "7", 0.0),
        (r"\boxed{3 million}", "3", 0.0),
        ("7 or so", "7", 0.0),
        ("", "7", 0.0),
        (r"\boxed{\frac{1}{}", "7", 0.0),
        (r"\boxed{7}", "", None),
        (r"\boxed{7}", None, None),
        (r"\boxed{7}", "?!", None),
        (r"\boxed{7}", 7, 1.0),
        ("<think>\\boxed{8}</think><answer>7</answer>", "7", 1.0),
    ],
)
def test_math_reward(completion: str, gold: object, score: float | None) -> None:
    assert math_reward([completion], answer=[gold]) == [score]
    message = [{"role": "assistant", "content": completion}]
    assert math_reward([message], solution=[gold], prompts=["q"]) == [score]


def test_math_reward_prefers_answer_to_solution() -> None:
    assert math_reward([r"\boxed{1}"], answer=["1"], solution=["2"]) == [1.0]


def test_math_reward_agrees_with_trl_on_boxed_latex() -> None:
    from trl.rewards import accuracy_reward

    golds = [r"\frac{1}{3}", r"\frac{1}{3}", "63", r"2\sqrt{5}", r"x^2-1"]
    texts = [
        r"\boxed{\frac{1}{3}}", r"\boxed{\frac{1}{2}}", r"$\boxed{63}$", r"\boxed{\sqrt{20}}",
        r"\boxed{(x-1)(x+1)}",
    ]  # fmt: skip
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    theirs = accuracy_reward(completions, [f"${gold}$" for gold in golds])
    assert math_reward(completions, answer=golds) == theirs == [1.0, 0.0, 1.0, 1.0, 1.0]


def test_exact_match_reward() -> None:
    completions = ["Oslo", "#### Oslo", " New  York", "oslo", r"\boxed{0.5}", "x"]
    golds = ["Oslo", "Oslo", "New York", "Oslo", "1/2", None]
    assert exact_match_reward(completions, answer=golds) == [1.0, 1.0, 1.0, 0.0, 0.0, None]


@pytest.mark.parametrize("reward", [math_reward, exact_match_reward])
def test_reference_column_is_checked(reward) -> None:
    with pytest.raises(ValueError, match=r"needs a column 'answer' or 'solution', got \['level'\]"):
        reward(["1"], level=[1])
    with pytest.raises(ValueError, match="answer must have one entry per completion = 2, got 1"):
        reward(["1", "2"], answer=["1"])
    assert reward([], answer=[]) == []


def test_hostile_texts_are_scanned_in_linear_time() -> None:
    """Half a million characters end in well under a second; quadratic work would not end."""
    code = """if True:
        from igrpo_algo.rewards import format_reward, math_reward
        pieces = ["\\\\boxed{", "<think>", "####", "answer is ", "<answer>", "{", "}", "\\\\", " :"]
        pieces += ["$", ".", "1,000", "\\\\text{", "**", "\\\\!"]
        for piece in pieces:
            text = piece * (500_000 // len(piece))
            for hostile in (text, text + "</answer>", "answer:" + text, "<answer>" + text):
                assert format_reward([hostile]) == [0.0]
                assert math_reward([hostile], answer=["42"]) == [0.0]
        """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
