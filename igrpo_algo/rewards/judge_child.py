r"""The process in which math-verify compares answers; `judge.MathJudge` starts and ends it.

It reads one question per line, {"gold": ..., "answer": ..., "seconds": ...}, and writes one reply,
{"equal": ...}: true, false, or null if the reference is not mathematics. The reply is {} if that
much processor time brings no verdict. It imports nothing of this package, so that it starts fast.

What math-verify judges unlike a person is handled here: numbers so small or so close that its
fixed precision calls them equal, false equations ("7 = 8" is not 8), unsolved ones ("2x = 6" is not
6), inequalities written as intervals or in two ways, what has an order and what has none, the
imaginary unit, and powers too large to write down, on which an algebra system runs forever.
"""

import contextlib
import functools
import json
import math
import re
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
    expected, given = read(gold), read(answer)
    if expected is None or count_digits(expected) > MAX_DIGITS:
        return None
    if given is None or count_digits(given) > MAX_DIGITS or is_false_equation(given):
        return False
    if is_unsolved(given) and not relations(expected):
        return False
    expected, given = as_sets(expected, given, gold, answer)
    if is_ordered(expected) != is_ordered(given):
        expected, given = as_tuple(expected, gold), as_tuple(given, answer)
        if has_no_order(expected, gold) or has_no_order(given, answer):
            return False
    if have_same_value(expected, given):
        return True
    bare, bare_given = without_percent(expected), without_percent(given)
    if (bare is expected) == (bare_given is given):
        return False
    return have_same_value(bare, bare_given)


def have_same_value(expected: Any, given: Any) -> bool:
    """Return whether two expressions are equal, numbers to as many digits as it takes."""
    from math_verify import verify

    if not verify(expected, given, timeout_seconds=None):
        return have_same_solutions(expected, given)
    if differ(expected, given):
        return False
    zeros = max(count_zeros(expected), count_zeros(given))
    digits = {"float_rounding": 6 + zeros, "numeric_precision": 15 + zeros}
    return zeros == 0 or verify(expected, given, **digits, timeout_seconds=None)


def without_percent(expression: Any) -> Any:
    """Turn 12.5% into 12.5, as math-verify takes 50% for 50; leave anything else."""
    from sympy import Mul, Rational, UnevaluatedExpr

    hundredth = UnevaluatedExpr(Rational(1, 100))
    if not (isinstance(expression, Mul) and hundredth in expression.args):
        return expression
    return Mul(*(part for part in expression.args if part != hundredth))


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Any:
    """Parse an answer; None if math-verify can't. `units.split_words` has dealt with units."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import Eq, Expr, I

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
    )
    target = LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)
    primes = re.sub("(?<=[A-Za-z])'+", lambda match: f"_{{{'p' * len(match[0])}}}", text)
    found = parse(
        rf"\boxed{{{primes}}}",
        extraction_config=[target],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    expression = found[0] if found else None
    if expression is None and text.count(r"\pm") == 1:
        return read(text.replace(r"\pm", "+") + ", " + text.replace(r"\pm", "-"))
    if isinstance(expression, Eq) and expression.rhs.is_Symbol and expression.lhs.is_number:
        return Eq(expression.rhs, expression.lhs, evaluate=False)  # 7 = x
    if isinstance(expression, Expr):
        imaginary = [symbol for symbol in expression.free_symbols if symbol.name == "i"]
        return expression.subs(dict.fromkeys(imaginary, I))
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


def is_unsolved(expression: Any) -> bool:
    """Return whether an equation leaves its unknown to be found: 2x = 6, -x = 5, x + 4 = 10."""
    from sympy import Eq

    unknowns = expression.lhs.free_symbols if isinstance(expression, Eq) else set()
    if len(unknowns) != 1 or expression.lhs.is_Symbol or not expression.rhs.is_number:
        return False
    return bool(expression.lhs.is_polynomial() and expression.lhs.diff(*unknowns).is_number)


def differ(expected: Any, given: Any) -> bool:
    """Return whether two exact numbers differ, however little; False if that is not known."""
    from sympy import Expr, Float, UnevaluatedExpr

    if not (isinstance(expected, Expr) and isinstance(given, Expr)):
        return False
    gap = expected - given
    if not gap.is_number or gap.has(Float, UnevaluatedExpr):  # 0.333333 is 1/3, and 50% is 50
        return False
    size = abs(gap).evalf(2)  # with as many digits as it takes; precision 1 if they do not suffice
    return bool(size.is_Float and size > 0 and size._prec > 1)


def is_ordered(expression: Any) -> bool:
    """Return whether an answer is a tuple, or the interval for which a pair is taken."""
    from sympy import Interval, Tuple

    return isinstance(expression, Tuple | Interval)


def as_tuple(expression: Any, text: str) -> Any:
    """Turn a list, or assignments by the names of their variables, into a tuple; else leave it."""
    from sympy import Eq, FiniteSet, Tuple

    parts = relations(expression)
    if len(parts) > 1 and all(isinstance(part, Eq) and part.lhs.is_Symbol for part in parts):
        return Tuple(*(part.rhs for part in sorted(parts, key=lambda part: part.lhs.name)))
    if isinstance(expression, FiniteSet) and len(expression.args) == 1:
        return expression.args[0]
    if isinstance(expression, FiniteSet) and not has_no_order(expression, text):
        return Tuple(*getattr(expression, "_unsorted_args", expression.args))
    return expression


def has_no_order(expression: Any, text: str) -> bool:
    r"""Return whether an answer is a set of values: {1, 2}, or what \pm stands for."""
    from sympy import FiniteSet

    return isinstance(expression, FiniteSet) and (text.startswith(r"\{") or r"\pm" in text)


def have_same_solutions(expected: Any, given: Any) -> bool:
    """Return whether inequalities of the same variable hold for the same values."""
    from math_verify import verify
    from sympy import Set

    if not (relations(expected) and relations(given)):
        return False
    if expected.free_symbols != given.free_symbols:
        return False
    expected, given = solution_set(expected, ""), solution_set(given, "")
    sets = isinstance(expected, Set) and isinstance(given, Set)
    return sets and verify(expected, given, timeout_seconds=None)


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
