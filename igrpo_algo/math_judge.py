"""Ask math-verify whether two answers are equal, in a process of its own that can be killed.

Answers come from a model, and `9^{9^{9^9}}` or `(10^9)!` costs an algebra system forever.
math-verify stops itself by a Unix signal, which works in the main thread only; a trainer that
scores in threads would hang. Here a child process does the algebra and the parent kills it at a
deadline, from any thread. The two exchange lines of JSON. Run as a file, this module is the child.
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

SECONDS_PER_STEP = 2  # each parse and each comparison, kept by math-verify's own alarm
SECONDS_PER_PAIR = 10.0  # the whole question, kept by the parent
SECONDS_TO_START = 120.0
MAX_CHARACTERS = 1000
MAX_MEMORY = 8 << 30


class MathJudge:
    r"""One child process with math-verify, started at the first question; safe to share.

    Args:
        seconds: Deadline of one question; the child is killed and replaced when it passes.

    Raises:
        ModuleNotFoundError: math-verify is not installed.

    Example:
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
        self.seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[str] | None = None
        self._owner = os.getpid()

    def equal(self, gold: str, answer: str) -> bool | None:
        """Return whether `answer` equals `gold`; None where `gold` is no mathematics.

        False where the answer is no mathematics, is longer than 1,000 characters, or where the
        comparison takes longer than the deadline.
        """
        if len(gold) > MAX_CHARACTERS:
            return None
        if len(answer) > MAX_CHARACTERS:
            answer = ""
        with self._lock:
            child = self._running()
            reply = _ask(child, {"gold": gold, "answer": answer}, self.seconds)
            if reply is None:
                self._stop(child)
        return reply["equal"] if reply else False

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
        child.kill()
        with contextlib.suppress(OSError):
            child.communicate()
        self._child = None


@functools.cache
def shared_judge() -> MathJudge:
    """Return the judge of this process, which ends with it."""
    judge = MathJudge()
    atexit.register(judge.close)
    return judge


def _start() -> "subprocess.Popen[str]":
    """Start a child and let it load math-verify before a deadline counts."""
    child = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    if _ask(child, {"gold": "1", "answer": "2"}, SECONDS_TO_START) is None:
        child.communicate()
        raise RuntimeError(f"the math-verify process did not start (exit code {child.returncode})")
    return child


def _ask(
    child: "subprocess.Popen[str]", question: dict[str, str], seconds: float
) -> dict[str, bool | None] | None:
    """Send one line and read one; None where the child died or was killed at the deadline."""
    assert child.stdin is not None
    assert child.stdout is not None
    alarm = threading.Timer(seconds, child.kill)
    alarm.start()
    try:
        child.stdin.write(json.dumps(question) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        alarm.cancel()
    return json.loads(line) if line.endswith("\n") else None


def _compare(gold: str, answer: str) -> bool | None:
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list[object]:
        return parse(
            rf"\boxed{{{text}}}",
            extraction_config=[LatexExtractionConfig(boxed_match_priority=0)],
            fallback_mode="no_fallback",
            parsing_timeout=SECONDS_PER_STEP,
        )

    expected = read(gold)
    if not expected:
        return None
    return bool(verify(expected, read(answer), timeout_seconds=SECONDS_PER_STEP))


def _serve() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    for line in sys.stdin:
        question = json.loads(line)
        try:
            equal = _compare(**question)
        except (Exception, MemoryError):
            equal = False
        print(json.dumps({"equal": equal}), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
