"""Rewards on texts as models write them: answers, formats, hostile input, user functions."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_algo.answers import (
    extract_answer,
    extract_gold,
    normalize_answer,
    split_choice,
    split_unit,
)
from igrpo_algo.math_judge import MathJudge
from igrpo_algo.rewards import (
    BUILT_IN_REWARDS,
    completion_text,
    exact_match_reward,
    format_reward,
    load_reward,
    math_reward,
    opened_format_reward,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So $x = \boxed{7}$.", "7"),
        (r"\boxed{\frac{3}{\sqrt{2}}}", r"\frac{3}{\sqrt{2}}"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{2} but \boxed{3", "2"),
        (r"\boxed{2} but \boxed{}", "2"),
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
        ("answer </answer> before <answer>", None),
        ("", None),
        ("I can't tell.", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


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
        ("2 pi", "2 pi"),
        ("2x", "2x"),
        ("1,23", "1,23"),
        ("1, 2", "1, 2"),
        (r"\text{(C)}", "C"),
        (r"\text{red}", "red"),
        (r"5\text{ cm}", "5 cm"),
        (r"1,005~\mathrm{cm}^{2}", "1005 cm^2"),
        (r"5\text{ or }6", r"5\text{ or }6"),
        ("+", "+"),
        ("", ""),
        ("$a$ and $b$", "a and b"),
    ],
)
def test_normalize_answer(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized


@pytest.mark.parametrize(
    ("answer", "split"),
    [
        ("5 km", ("5", "km")),
        ("5 kilometers", ("5", "km")),
        ("5kg", ("5", "kg")),
        ("60 miles per hour", ("60", "mi/h")),
        ("9 square feet", ("9", "ft^2")),
        ("9 ft^2", ("9", "ft^2")),
        (r"2\sqrt{3}\text{ cm}^{3}", (r"2\sqrt{3}", "cm^3")),
        ("9 ft^7", ("9 ft^7", "")),
        ("2 thirds", ("2 thirds", "")),
        ("5 m less", ("5 m less", "")),
        ("2", ("2", "")),
        ("m", ("m", "")),
        (r"\text{m}", (r"\text{m}", "")),
    ],
)
def test_split_unit(answer: str, split: tuple[str, str]) -> None:
    assert split_unit(answer) == split


def test_split_choice() -> None:
    assert split_choice(r"\textbf{(B)}\ 5") == split_choice("(B) 5") == ("B", "5")
    assert split_choice(r"\textbf{(B)}\quad\frac12") == ("B", r"\frac12")
    assert [split_choice(a)[0] for a in ("B", "(B, 5)", "(b) 5")] == ["", "", ""]


@given(st.text(alphabet="0123456789,.$ \\{}()abtex*+-/!%", max_size=30))
@settings(deadline=None, max_examples=200)
def test_normalize_is_idempotent_and_gold_reads_its_own_box(text: str) -> None:
    once = normalize_answer(text)
    assert normalize_answer(once) == once
    number = f"{len(text) * 1234567:,}"
    assert extract_answer(f"text {number} \\boxed{{{number}}}") == number


def test_extract_gold_reads_cells() -> None:
    assert extract_gold("Tom has 3 + 4 = <<3+4=7>>7 pens.\n#### 7") == "7"
    assert extract_gold(r"Adding gives $\boxed{\frac{7}{2}}$.") == r"\frac{7}{2}"
    assert [extract_gold(v) for v in (None, "", "  ", 7, 2.5, "x+1")] == [
        None, None, None, "7", "2.5", "x+1",
    ]  # fmt: skip
    assert extract_gold(float("nan")) is None
    with pytest.raises(TypeError, match=r"an answer must be a string, a number or None, got \[1\]"):
        extract_gold([1])
    with pytest.raises(TypeError, match="got True"):
        extract_gold(True)


@pytest.mark.parametrize(
    ("completion", "gold", "score"),
    [
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{\dfrac{2}{4}}", "1/2", 1.0),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1.0),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
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


def score_in_a_thread(judge: MathJudge, *pairs: tuple[str, str]) -> list[bool | None]:
    scores: list[bool | None] = []

    def score() -> None:
        scores.extend([judge.equal(gold, answer) for gold, answer in pairs])

    thread = threading.Thread(target=score, daemon=True)
    thread.start()
    thread.join(timeout=60)
    return scores


def test_hostile_answers_end_in_a_thread() -> None:
    judge = MathJudge()
    pairs = ("42", "9^{9^{9^{9}}}"), ("42", r"(10^9)!"), ("42", r"\frac{84}{2}")
    assert score_in_a_thread(judge, *pairs) == [False, False, True]
    judge.close()


def test_a_stuck_child_is_killed_at_the_deadline_and_replaced() -> None:
    judge = MathJudge(seconds=3.0)
    assert judge.equal("4", "2+2") is True
    stuck = judge._child
    assert stuck is not None
    stuck.send_signal(signal.SIGSTOP)
    scores = score_in_a_thread(judge, ("4", "2+2"), ("4", "2+2"))
    stuck.kill()
    assert scores == [False, True]
    judge.close()


def test_judge_survives_its_child_and_close() -> None:
    judge = MathJudge()
    assert judge.equal("4", "2+2") is True
    child = judge._child
    assert child is not None
    child.kill()
    child.wait()
    assert judge.equal("4", "2+2") is False  # this question is lost, as at a deadline
    assert judge.equal("4", "2+2") is True
    judge.close()
    assert judge.equal("4", "2+3") is False
    assert judge.equal("4", "4" * 1001) is False
    assert judge.equal("4" * 1001, "4") is None
    judge.close()


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


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>\na\nb\n</think>\n\n<answer>\nb\n</answer>\n", 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer>.", 0.0),
        ("ok <think>a</think><answer>b</answer>", 0.0),
        ("<think></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think>a<think></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("a</think><answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format_reward(text: str, score: float) -> None:
    assert format_reward([text], answer=["b"]) == [score]
    assert opened_format_reward([text.removeprefix("<think>")]) == (
        [score] if text.startswith("<think>") else opened_format_reward([text])
    )


def test_opened_format_reward() -> None:
    texts = ["a</think><answer>b</answer>", "<think>a</think><answer>b</answer>", "a"]
    assert opened_format_reward(texts) == [1.0, 0.0, 0.0]


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


def test_completion_text() -> None:
    blocks = [{"type": "text", "text": "4"}, {"type": "image"}, {"type": "text", "text": "2"}]
    assert completion_text([{"role": "assistant", "content": blocks}]) == "42"
    turns = [{"role": "assistant", "content": "1"}, {"role": "assistant", "content": "2"}]
    assert completion_text(turns) == "2"
    for bad in ([], 3, [{"role": "assistant"}], [{"content": None}]):
        with pytest.raises(TypeError, match="a completion must be a string or a list of messages"):
            completion_text(bad)


def test_load_reward_by_name_and_from_the_current_directory(tmp_path: Path, monkeypatch) -> None:
    for name, reward in BUILT_IN_REWARDS.items():
        assert load_reward(name) is reward
    (tmp_path / "my_rewards_here.py").write_text(
        "class Scores:\n    @staticmethod\n    def length(completions, **_):\n"
        "        return [float(len(c)) for c in completions]\nlimit = 3\n"
    )
    (tmp_path / "my_broken_rewards.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert load_reward("my_rewards_here:Scores.length")(["abc"]) == [3.0]
    with pytest.raises(ValueError, match=r"my_rewards_here has no attribute 'Scores.width'"):
        load_reward("my_rewards_here:Scores.width")
    with pytest.raises(TypeError, match="reward 'my_rewards_here:limit' must be callable, got int"):
        load_reward("my_rewards_here:limit")
    with pytest.raises(
        ImportError, match=r"'my_broken_rewards' could not.*no_such_module_anywhere"
    ):
        load_reward("my_broken_rewards:f")


@pytest.mark.parametrize("name", ["maths", "", ":f", "module:"])
def test_load_reward_names_what_it_knows(name: str) -> None:
    with pytest.raises(ValueError, match=r"one of math, exact, format, format-opened or module:fu"):
        load_reward(name)


def test_importing_rewards_loads_no_math_library() -> None:
    code = (
        "import sys, igrpo_algo.rewards;"
        "print([m for m in ('math_verify', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_missing_math_verify_is_named(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'igrpo\[train\]'"):
        MathJudge()
