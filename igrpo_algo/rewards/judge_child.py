r"""The process in which math-verify compares answers; `judge.MathJudge` runs this file and ends it.

It reads one question per line, {"gold": ..., "answer": ..., "seconds": ...}, and writes one reply,
{"equal": ...}: true, false, or null if the reference is not mathematics. The reply is {} if that
much processor time brings no verdict. It imports nothing of this package, so that it starts fast.

Four things math-verify judges unlike a person, and they are handled here: numbers so small that
its fixed precision calls them equal, false equations ("7 = 8" is not 8), an inequality in place of
an interval, and powers too large to write down, over which an algebra system runs for ever.
"""

import contextlib
import functools
import json
import math
import signal
import sys
from collections.abc import Iterator
from typing import Any

MAX_DIGITS = 100_000
MAX_MEMORY = 8 << 30


class OutOfTimeError(BaseException):
    """A question has used up its time. Not an Exception: libraries would catch it."""


def compare(gold: str, answer: str) -> bool | None:
    """Return whether two answers are equal; None for an unreadable `gold`."""
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
    """Parse an answer; None if math-verify can't. `units.split_words` has dealt with units."""
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
    """Return the equations and inequalities of a chain or a list; [] for anything else."""
    from latex2sympy2_extended.logic import And
    from sympy import FiniteSet
    from sympy.core.relational import Relational

    if isinstance(expression, And):
        return list(expression._unsorted_args)
    parts = expression.args if isinstance(expression, FiniteSet) else [expression]
    return list(parts) if all(isinstance(part, Relational) for part in parts) else []


def is_false_equation(expression: Any) -> bool:
    """Return whether an equation between numbers does not hold, alone or in a chain."""
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
    """Turn inequalities on one side into the set they describe if the other side is a set."""
    from sympy import Set

    if isinstance(expected, Set) and not relations(expected):
        return expected, solution_set(given, answer)
    if isinstance(given, Set) and not relations(given):
        return solution_set(expected, gold), given
    return expected, given


def solution_set(expression: Any, text: str) -> Any:
    """Return the set that inequalities of one variable describe; anything else as it is."""
    from latex2sympy2_extended.logic import And
    from sympy import Eq, Intersection, Union

    parts = relations(expression)
    symbols = {symbol for part in parts for symbol in part.free_symbols}
    if len(symbols) != 1 or any(isinstance(part, Eq) for part in parts):
        return expression
    try:
        solutions = [part.as_set() for part in parts]
    except Exception:  # sympy can't solve it
        return expression
    if isinstance(expression, And) or " and " in text:
        return Intersection(*solutions)
    return Union(*solutions) if len(parts) == 1 or " or " in text else expression


def count_digits(expression: Any) -> float:
    """Bound the number of decimal digits that evaluating an expression may have to write down."""
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
    """Count the zeros between the decimal point and the first digit of the smallest part."""
    from sympy import Expr, Integer, log

    if not isinstance(expression, Expr):
        return max(map(count_zeros, getattr(expression, "args", ())), default=0)
    size = abs(expression.xreplace(dict.fromkeys(expression.free_symbols, Integer(1))).evalf(5))
    if not (size.is_Float and size > 0 and size < 1):
        return 0
    return max(0, -math.floor(float(log(size, 10))) - 1)


@contextlib.contextmanager
def limit_cpu(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in a block that uses more processor time."""
    if not hasattr(signal, "setitimer"):  # on Windows, the parent alone keeps time
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; it ends with its input
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
