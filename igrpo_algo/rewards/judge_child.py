r"""The process in which math-verify compares answers; `judge.MathJudge` runs this file and ends it.

It reads one question a line, {"gold": ..., "answer": ..., "seconds": ...}, and writes one reply:
{"equal": true}, false, null where the reference is no mathematics, or {} where it found no verdict
in that much processor time. It imports nothing of this package, so that it starts fast.

math-verify is asked with care for what it reads differently from a person: numbers so small that
its fixed precision calls them equal, false equations ("7 = 8" is not 8), an inequality in the
place of an interval, and powers too large to write down, on which an algebra system never ends.
"""

import contextlib
import functools
import json
import math
import signal
import sys
from collections.abc import Iterator
from typing import Any

MAX_DIGITS = 100_000  # of a number that may come up
MAX_MEMORY = 8 << 30


class OutOfTimeError(BaseException):
    """A question has used up its time. No Exception, for libraries catch those on their way."""


def compare(gold: str, answer: str) -> bool | None:
    """Return whether two answers are equal; None where `gold` is no mathematics.

    False where `answer` is none.
    """
    from math_verify import verify

    expected, given = read(gold), read(answer)
    if expected is None or count_digits(expected) > MAX_DIGITS:
        return None
    if given is None or count_digits(given) > MAX_DIGITS or is_false_equation(given):
        return False
    expected, given = as_sets(expected, given, gold, answer)
    if not verify(expected, given, timeout_seconds=None):
        return False
    zeros = max(count_zeros(expected), count_zeros(given))
    return zeros == 0 or verify(
        expected,
        given,
        float_rounding=6 + zeros,
        numeric_precision=15 + zeros,
        timeout_seconds=None,
    )


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Any:
    """Parse an answer; None where math-verify can't.

    Units are left alone: `units.split_words` has taken off those that are known.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import Eq

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
    )
    target = LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)
    found = parse(
        rf"\boxed{{{text}}}",
        extraction_config=[target],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    expression = found[0] if found else None
    if isinstance(expression, Eq) and expression.rhs.is_Symbol and expression.lhs.is_number:
        return Eq(expression.rhs, expression.lhs, evaluate=False)  # 7 = x
    return expression


def relations(expression: Any) -> list[Any]:
    """Return the parts of a chain of equations or inequalities, or of a list of inequalities."""
    from latex2sympy2_extended.logic import And
    from sympy import FiniteSet
    from sympy.core.relational import Relational

    if isinstance(expression, And):
        return list(expression._unsorted_args)
    parts = expression.args if isinstance(expression, FiniteSet) else [expression]
    return list(parts) if all(isinstance(part, Relational) for part in parts) else []


def is_false_equation(expression: Any) -> bool:
    """Return whether an equation between numbers, or a part of a chain, does not hold."""
    from math_verify import verify
    from sympy import Eq

    return any(
        isinstance(part, Eq)
        and part.lhs.is_number
        and part.rhs.is_number
        and not verify(part.lhs, part.rhs, timeout_seconds=None)
        for part in relations(expression)
    )


def as_sets(expected: Any, given: Any, gold: str, answer: str) -> tuple[Any, Any]:
    """Turn inequalities into the set that they describe where the other side is a set."""
    from sympy import Set

    if isinstance(expected, Set) and not relations(expected):
        given = solution_set(given, answer) or given
    elif isinstance(given, Set) and not relations(given):
        expected = solution_set(expected, gold) or expected
    return expected, given


def solution_set(expression: Any, text: str) -> Any:
    """Return what solves inequalities of one variable; None where that is not clear."""
    from latex2sympy2_extended.logic import And
    from sympy import Eq, Intersection, Union

    parts = relations(expression)
    symbols = {symbol for part in parts for symbol in part.free_symbols}
    if len(symbols) != 1 or any(isinstance(part, Eq) for part in parts):
        return None
    try:
        solutions = [part.as_set() for part in parts]
    except Exception:  # sympy can't solve it
        return None
    if isinstance(expression, And) or " and " in text:
        return Intersection(*solutions)
    return Union(*solutions) if len(parts) == 1 or "or" in text else None


def count_digits(expression: Any) -> float:
    """Bound the decimal digits of the numbers that come up when an expression is evaluated."""
    from sympy import Pow, Rational, exp, factorial

    if isinstance(expression, Rational):
        return max(abs(expression.p), expression.q).bit_length() * math.log10(2)
    parts = [count_digits(part) for part in getattr(expression, "args", ())]
    if not parts:
        return 1.0
    if isinstance(expression, Pow | exp | factorial):
        return parts[0] * 10.0 ** min(parts[-1], 300.0)
    return max(sum(parts), 1.0)


def count_zeros(expression: Any) -> int:
    """Count the zeros between the decimal point and the first digit of the smallest number."""
    from sympy import Expr, Integer, log

    if not isinstance(expression, Expr):
        return max(map(count_zeros, getattr(expression, "args", ())), default=0)
    size = abs(expression.xreplace(dict.fromkeys(expression.free_symbols, Integer(1))).evalf(5))
    if not (size.is_Float and size > 0 and size < 1):
        return 0
    return max(0, -math.floor(float(log(size, 10))) - 1)


@contextlib.contextmanager
def limit_cpu(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the block once it has used that much processor time."""
    if not hasattr(signal, "setitimer"):  # on Windows only the parent keeps time
        yield
        return

    late = False

    def stop(*_: object) -> None:
        nonlocal late
        late = True
        raise OutOfTimeError

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if late:  # a library has swallowed the exception
        raise OutOfTimeError


def serve() -> None:
    """Answer questions until there are no more."""
    replies, sys.stdout = sys.stdout, sys.stderr
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; we end by EOF
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    for line in sys.stdin:
        question = json.loads(line)
        try:
            with limit_cpu(question.pop("seconds")):
                reply = {"equal": compare(**question)}
        except (Exception, OutOfTimeError):
            reply = {}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()
