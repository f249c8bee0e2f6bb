"""The process that compares answers: hostile questions, deadlines, interrupts."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from igrpo_algo.rewards import math_reward
from igrpo_algo.rewards.judge import LEAST_CPU_SECONDS, MathJudge, NoVerdictError, shared_judge


@pytest.fixture
def judge() -> Iterator[MathJudge]:
    judge = MathJudge()
    yield judge
    judge.close()


def ask_in_a_thread(judge: MathJudge, *pairs: tuple[str, str]) -> list[bool | str | None]:
    """Ask where Unix signals don't work; a question without a verdict yields its error's name."""
    verdicts: list[bool | str | None] = []

    def ask() -> None:
        for gold, answer in pairs:
            try:
                verdicts.append(judge.equal(gold, answer))
            except NoVerdictError as error:
                verdicts.append(type(error).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout=60)
    return verdicts


def test_hostile_answers_end_in_a_thread(judge: MathJudge) -> None:
    pairs = ("42", "9^{9^{9^{9}}}"), ("42", r"(10^9)!"), ("9^{9^9}", "42"), ("42", r"\frac{84}{2}")
    assert ask_in_a_thread(judge, *pairs) == [False, False, None, True]


def test_power_towers_are_refused_before_they_cost_any_time() -> None:
    for base in range(2, 66):  # one by one: without the bound, each costs a deadline
        assert math_reward([rf"\boxed{{{base}^{{9^{{9^9}}}}}}"], answer=["5"]) == [0.0]


def test_large_numbers_within_the_bound_are_compared(judge: MathJudge) -> None:
    pairs = (
        (r"\frac{2024!}{2023!}", "2024"),
        ("2^{2024}", "2^{2024}+1"),
        ("10^{30}", "1" + "0" * 30),
    )
    assert [judge.equal(*pair) for pair in pairs] == [True, False, True]


def test_slow_questions_leave_less_time_to_the_next_and_verdicts_give_it_back(
    judge: MathJudge,
) -> None:
    pairs = [("7", rf"\sum_{{k=1}}^{{10^9}} \sin(k + {n})") for n in range(4)]
    assert ask_in_a_thread(judge, *pairs) == ["NoVerdictError"] * 4
    child, left = judge._child, judge._cpu_seconds
    assert LEAST_CPU_SECONDS <= left < 0.2
    assert judge.equal("4", "2+2") is True
    assert judge._child is child  # it stopped by itself
    assert judge._cpu_seconds > left


def test_a_stuck_child_is_killed_at_the_deadline_and_replaced(judge: MathJudge) -> None:
    judge.seconds = 3.0
    assert judge.equal("4", "2+2") is True
    stuck = judge._child
    assert stuck is not None
    stuck.send_signal(signal.SIGSTOP)
    verdicts = ask_in_a_thread(judge, ("4", "2+2"), ("4", "2+2"))
    stuck.kill()
    assert verdicts == ["NoVerdictError", True]


def test_judge_survives_its_child_and_close(judge: MathJudge) -> None:
    assert judge.equal("4", "2+2") is True
    child = judge._child
    assert child is not None
    child.kill()
    child.wait()
    with pytest.raises(NoVerdictError):
        judge.equal("4", "2+2")
    assert judge.equal("4", "2+2") is True
    judge.close()
    assert judge.equal("4", "2+3") is False
    assert judge.equal("4", "4" * 1001) is False
    assert judge.equal("4" * 1001, "4") is None


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT, and hand that on to what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_soon(pid: int) -> None:
    threading.Timer(1.5, os.kill, (pid, signal.SIGINT)).start()  # the read waits by then


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_an_interrupted_question_is_not_answered_later(judge: MathJudge) -> None:
    """Ctrl-C in a notebook: the late answer must not count for the next question."""
    assert judge.equal("0.5", "1/2") is True
    assert judge._child is not None
    judge._child.send_signal(signal.SIGSTOP)  # the question is on its way, the answer is not
    interrupt_soon(os.getpid())
    with pytest.raises(KeyboardInterrupt):
        judge.equal("5", "6")
    right = [("1/3", "2/6"), ("1/4", "2/8"), ("1/5", "2/10")]
    assert [judge.equal(*pair) for pair in right] == [True] * 3


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_in_the_terminal_leaves_the_child_alone(judge: MathJudge) -> None:
    assert judge.equal("0.5", "1/2") is True
    assert judge._child is not None
    judge._child.send_signal(signal.SIGINT)
    assert judge.equal("0.5", "2/4") is True


def test_a_missing_verdict_is_unscored_and_not_remembered(monkeypatch) -> None:
    judge = shared_judge()
    assert math_reward([r"\boxed{0.25}"], answer=["1/4"]) == [1.0]
    assert judge._child is not None
    judge._child.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(judge, "seconds", 0.1)
    assert math_reward([r"\boxed{0.2}"], answer=["1/5"]) == [None]
    monkeypatch.undo()
    assert math_reward([r"\boxed{0.2}"], answer=["1/5"]) == [1.0]
    assert judge._child is not None
    judge._child.kill()
    assert math_reward([r"\boxed{0.125}"], answer=["1/8"]) == [None]
    assert math_reward([r"\boxed{0.125}"], answer=["1/8"]) == [1.0]


def test_missing_math_verify_is_named(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'igrpo\[train\]'"):
        MathJudge()
