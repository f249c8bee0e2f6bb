r"""Ask math-verify whether two answers are equal, in a separate process that can be killed.

Answers come from a model, and an algebra system may run forever on one. math-verify's own time
limit is a Unix signal, which works in the main thread only; a trainer that scores in threads would
hang. Here a child process (`judge_child`) does the algebra, and the parent can kill it from any
thread. The two exchange lines of JSON.
"""

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from igrpo_kernels.checks import check_number

from .answers import MAX_CHARACTERS

CPU_SECONDS = 1.0
"""Processor time of one question; an ordinary one takes a hundredth of it."""
LEAST_CPU_SECONDS = 0.1
SECONDS_PER_PAIR = 20.0  # wall time, in case the child can't stop itself
SECONDS_TO_START = 120.0
_CHILD = Path(__file__).with_name("judge_child.py")


class NoVerdictError(RuntimeError):
    """The judge ran out of time or was killed before it reached a verdict."""


class MathJudge:
    r"""One child process with math-verify, started at the first question; safe to share.

    If Ctrl-C or any other exception interrupts a question, the child is ended: its late reply must
    not be read as the reply to the next question.

    A question may use one second of processor time. After each one that runs out of time the next
    gets half as much, down to a tenth of a second, and each verdict gives a little back: a batch of
    answers made to be slow costs seconds, not minutes.

    Args:
        seconds: Deadline of one question; the child is killed and replaced when it passes.

    Raises:
        ModuleNotFoundError: math-verify is not installed.

    Examples:
        >>> judge = MathJudge()
        >>> judge.equal("0.5", r"\frac{1}{2}"), judge.equal("0.5", "2")
        (True, False)
        >>> judge.close()
    """

    def __init__(self, *, seconds: float = SECONDS_PER_PAIR) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError(
                "math-verify is not installed: pip install 'igrpo[train]'", name="math_verify"
            )
        self.seconds = check_number("seconds", seconds, above=0)
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._owner = os.getpid()
        self._cpu_seconds = CPU_SECONDS

    def equal(self, gold: str, answer: str) -> bool | None:
        """Return whether `answer` equals `gold`; None if `gold` is not mathematics.

        False if `answer` is not mathematics, or is longer than 1,000 characters, or stands for a
        number of more than 100,000 digits; None if `gold` is such.

        Raises:
            NoVerdictError: The child ran out of time or was killed; to ask again may help.
        """
        if len(gold) > MAX_CHARACTERS:
            return None
        if len(answer) > MAX_CHARACTERS:
            answer = ""
        with self._lock:
            child = self._running()
            question = {"gold": gold, "answer": answer, "seconds": self._cpu_seconds}
            try:
                reply = _ask(child, question, self.seconds)
            except BaseException:
                self._stop(child)
                raise
            if "equal" not in reply:
                self._cpu_seconds = max(LEAST_CPU_SECONDS, self._cpu_seconds / 2)
                raise NoVerdictError(f"math-verify came to no verdict on {answer!r} in time")
            self._cpu_seconds = min(CPU_SECONDS, self._cpu_seconds + 0.02)
            return reply["equal"]

    def close(self) -> None:
        """End the child process; a later question starts another."""
        with self._lock:
            if self._child is not None and self._owner == os.getpid():
                self._stop(self._child)

    def _running(self) -> "subprocess.Popen[str]":
        if self._child is None or self._owner != os.getpid():  # a fork must not share the pipes
            self._child, self._owner = _start(), os.getpid()
        return self._child

    def _stop(self, child: "subprocess.Popen[str]") -> None:
        self._child = None
        _end(child)


@functools.cache
def shared_judge() -> MathJudge:
    """Return the judge of this process, which ends with it."""
    judge = MathJudge()
    atexit.register(judge.close)
    return judge


def _start() -> "subprocess.Popen[str]":
    """Start a child and let it load math-verify before a deadline counts."""
    child = subprocess.Popen(
        [sys.executable, "-P", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    warm_up = {"gold": "0.25", "answer": r"\frac{1}{2}", "seconds": SECONDS_TO_START}
    try:
        _ask(child, warm_up, SECONDS_TO_START)
    except NoVerdictError:
        _end(child)
        raise RuntimeError(
            f"the math-verify process did not start (exit code {child.returncode})"
        ) from None
    except BaseException:
        _end(child)
        raise
    return child


def _end(child: "subprocess.Popen[str]") -> None:
    child.kill()
    with contextlib.suppress(OSError, ValueError):
        child.communicate()


def _ask(
    child: "subprocess.Popen[str]", question: Mapping[str, object], seconds: float
) -> dict[str, bool | None]:
    """Send one line and read one."""
    assert child.stdin is not None
    assert child.stdout is not None
    alarm = threading.Timer(seconds, child.kill)
    alarm.start()
    try:
        child.stdin.write(json.dumps(question) + "\n")
        child.stdin.flush()
        reply = child.stdout.readline()
    except BrokenPipeError:
        reply = ""
    finally:
        alarm.cancel()
    if not reply.endswith("\n"):
        raise NoVerdictError(f"math-verify did not answer within {seconds} s, or was killed")
    return json.loads(reply)
