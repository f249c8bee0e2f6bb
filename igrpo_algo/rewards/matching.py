r"""Rewards that compare a completion's final answer with a reference."""

import functools
import re
from collections.abc import Mapping, Sequence

from .answers import (
    CompletionLike,
    check_column,
    completion_text,
    extract_answer,
    extract_gold,
    normalize_answer,
)
from .judge import NoVerdictError, shared_judge
from .remarks import VALUE_WORDS
from .units import split_words

_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_PRODUCT = re.compile(r"[abcxyz]{2}|[b-df-hj-np-tv-z]{2}", re.IGNORECASE)
_SENTENCE_WORDS = frozenset(
    {"is", "are", "was", "has", "have", "get", "gets", "gives", "means", "equals", "we", "so"}
    | {"hence", "thus", "since", "because", "therefore", "then", "let", "there"}
)
_MAX_WORDS = 12
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_CHOICE = re.compile(r"(?:\(([A-Z])\)|([A-Z])[).:](?= )) *(.+)")  # (B) 5, B) 5, B: 5
_NEXT_CHOICE = re.compile(r"(?:^|[\s,;{])\(?[A-Z]\)")
_BASED = re.compile(r"\(?(\d[0-9A-Za-z]*)\)?_(?:(\d)|\{\(?(\d\d?)\)?\})")
_INTEGER = re.compile(r"[-+]?\d+")
_DIGITS = re.compile("[0-9A-Za-z]+")
# Not for math-verify: two numbers side by side, which it would add up, numbers with two points,
# which it would multiply, and lists with an ellipsis.
_UNREADABLE = re.compile(r"\d \d|\d\.\d+\.\d|\\ldots")
_DATE_OR_TIME = re.compile(
    r"\d{4}[-/]\d\d?[-/]\d\d?|\d\d?[-/]\d\d?[-/]\d{4}|\d\d?:0\d(?: .*)?|\d\d?:\d\d [ap]m"
)
_ARTICLE = re.compile("^(?:an?|the) ")
# A reference that says where the answer is, or that there is none to compare with.
_ELSEWHERE = re.compile(
    r"^(?:see|refer to|as shown|n/?a$|none given|not (?:given|provided|available))\b"
    r"|\b(?:figures?|diagrams?|images?|pictures?|attached|omitted|var(?:y|ies)|answers?|proofs?"
    r"|explanation|tbd)\b",
    re.IGNORECASE,
)


def math_reward(
    completions: Sequence[CompletionLike],
    *,
    answer: Sequence[object] | None = None,
    solution: Sequence[object] | None = None,
    **columns: object,
) -> list[float | None]:
    r"""Score 1 where the final answer equals the reference, 0 where it does not.

        R(o) = 1[extract(o) = a]

    `extract_answer` finds the answer in both texts (answer tags, `\boxed{}`, `####`, "the answer
    is"), and `normalize_answer` brings both to one spelling. Equal spellings are equal; math-verify
    decides about the others, in a process that can be killed (0.5 equals \frac{1}{2}).

    - Units: a known one (`split_words`) is ignored if the other side has none; "5 km" is not "5 m".
      Other words after a number ("2 thirds", "72 clips") must be the same on both sides.
    - Words: a reference of words is compared as text, ignoring case. Two letters are a product
      ("xy" equals "yx") if both are consonants or from a, b, c, x, y, z; else a word ("no").
    - Choices: "(B) 5" is B against a letter and 5 against a value.
    - Bases: a subscript is a base, so 101_2 equals 5. Against the reference 52_8, the answer 52 is
      taken to be in base 8, and an answer in another base is wrong.
    - math-verify is lenient: 50\% equals both 50 and 0.5, 3/4 equals 3:4, x = 2 equals 2,
      1 < x < 2 equals (1, 2), and b equals B.

    The score is 0 if the completion states no answer, or one that is not mathematics, longer than
    1,000 characters, or a number of more than 100,000 digits. It is None if there is no verdict:
    the reference is empty, not mathematics, a worked solution that marks no answer, or a pointer to
    one ("see the figure"), unless the completion's answer is spelled like it; or if math-verify ran
    out of time or was killed. Verdicts are remembered; a question without one is asked again.

    Source: iGRPO, arXiv:2602.09000, Eq. 6; the reading of answers is ours.

    Args:
        completions: One per row: a string or a list of messages.
        answer: Reference answers.
        solution: Worked solutions or answers; read in rows where `answer` is empty or not given.
        **columns: Whatever else a trainer passes; ignored.

    Returns:
        One score per completion.

    Raises:
        ModuleNotFoundError: math-verify is needed and not installed.
        TypeError: A completion is neither a string nor messages, or a reference is neither a string
            nor a number.
        ValueError: Neither column is given, a column's length differs from that of `completions`,
            or a reference is infinite or has more than 4,300 digits as a number.

    Examples:
        >>> math_reward([r"\boxed{\frac{1}{2}}", "#### 3", "Hm."], answer=["0.5", "4", "1"])
        [1.0, 0.0, 0.0]
    """
    golds = _references("math_reward", completions, answer, solution, columns)
    return [
        _score_math(gold, extract_answer(completion_text(completion)))
        for completion, gold in zip(completions, golds, strict=True)
    ]


def _score_math(gold: str | None, answer: str | None) -> float | None:
    if gold is None:
        return None
    try:
        equal = _equal_answers(normalize_answer(gold), normalize_answer(answer or ""))
    except NoVerdictError:  # raised, not returned: the cache below must not remember it
        return None
    return None if equal is None else float(equal)


@functools.lru_cache(maxsize=16384)
def _equal_answers(gold: str, answer: str) -> bool | None:
    if gold == answer:
        return True
    gold_letter, gold_value = split_choice(gold)
    letter, value = split_choice(answer)
    if gold_letter and letter:
        return gold_letter == letter
    if gold_letter:
        gold = gold_letter if _is_letter(answer) else gold_value
    if letter:
        answer = letter if _is_letter(gold) else value
    return _equal_measures(gold, answer)


def _equal_measures(gold: str, answer: str) -> bool | None:
    """Compare values with the units or other words after them."""
    gold_value, gold_words, gold_known = split_words(gold)
    value, words, known = split_words(answer)
    if gold_words != words and ((gold_words and words) or not (gold_known and known)):
        return None if _is_prose(gold) else False
    return _equal_values(gold_value, value)


def _equal_values(gold: str, answer: str) -> bool | None:
    if gold == answer:
        return True
    if _is_prose(gold) or _UNREADABLE.search(gold):
        return None
    if _is_text(gold) or _DATE_OR_TIME.fullmatch(answer):
        return _ARTICLE.sub("", gold.casefold()) == _ARTICLE.sub("", answer.casefold())
    if _UNREADABLE.search(answer):
        return False
    gold_base, gold_number = read_base(gold)
    base, number = read_base(answer, default=gold_base)
    if gold_base != 10 and gold_number is not None:
        return (base, number) == (gold_base, gold_number)
    if number is not None and gold_number is not None:
        return number == gold_number
    return shared_judge().equal(gold, answer if number is None else str(number))


def split_choice(answer: str) -> tuple[str, str]:
    r"""Split "(B) 5" into the letter of a choice and its value; ("", answer) for anything else.

    Args:
        answer: What `normalize_answer` returned.

    Returns:
        The letter and the value.

    Examples:
        >>> split_choice("(B) 5"), split_choice("(A) 5 (B) 6")
        (('B', '5'), ('', '(A) 5 (B) 6'))
    """
    choice = _CHOICE.fullmatch(answer)
    if not choice or _NEXT_CHOICE.search(choice[3]):
        return "", answer
    return choice[1] or choice[2], choice[3]


def read_base(answer: str, *, default: int = 10) -> tuple[int, int | None]:
    """Read an integer with its base as a subscript.

    Args:
        answer: What `normalize_answer` returned.
        default: The base of an integer without one.

    Returns:
        The base, and the integer, or None if it is not an integer in that base.

    Examples:
        >>> read_base("52_{8}"), read_base("52"), read_base("52_3")
        ((8, 42), (10, 52), (3, None))
    """
    based = _BASED.fullmatch(answer)
    digits, base = (based[1], int(based[2] or based[3])) if based else (answer, default)
    if not based and not (_INTEGER if default == 10 else _DIGITS).fullmatch(answer):
        return default, None
    try:
        return base, int(digits, base)
    except ValueError:
        return base, None


def _is_letter(answer: str) -> bool:
    return len(answer) == 1 and answer.isalpha()


def _is_text(answer: str) -> bool:
    if not _WORDS.fullmatch(answer):
        return bool(_DATE_OR_TIME.fullmatch(answer))
    return max(map(len, re.split("[ '-]", answer))) >= 2 and not _PRODUCT.fullmatch(answer)


def _is_prose(gold: str) -> bool:
    """Return whether a reference is prose or a pointer, from which no answer can be read."""
    if _ELSEWHERE.search(gold) and not re.search(r"\d", gold):
        return True
    words = [word.lower() for word in _WORD.findall(gold)]
    until_last_number = re.match(r"[\s\S]*(?=\d)", gold)
    before = _WORD.findall(until_last_number[0]) if until_last_number else []
    before = [word for word in before if len(word) > 2 and word not in VALUE_WORDS]
    return (
        len(words) > _MAX_WORDS
        or not _SENTENCE_WORDS.isdisjoint(words)
        or len(before) > 1
        or (len(before) == 1 and ", " in gold)
    )


def exact_match_reward(
    completions: Sequence[CompletionLike],
    *,
    answer: Sequence[object] | None = None,
    solution: Sequence[object] | None = None,
    **columns: object,
) -> list[float | None]:
    """Score 1 where the final answer is spelled like the reference, 0 where it is not.

    Like `math_reward`, but without any mathematics: `extract_answer` finds both sides (the whole
    completion if it marks no answer), and they are compared with blanks collapsed.

    Args:
        completions: One per row: a string or a list of messages.
        answer: Reference answers.
        solution: Worked solutions or answers; read in rows where `answer` is empty or not given.
        **columns: Whatever else a trainer passes; ignored.

    Returns:
        One score per completion; None where the reference is empty.

    Raises:
        TypeError: A completion is neither a string nor messages, or a reference is neither a string
            nor a number.
        ValueError: Neither column is given, a column's length differs from that of `completions`,
            or a reference is infinite or has more than 4,300 digits as a number.

    Examples:
        >>> exact_match_reward(["The answer is  Oslo.", "Bergen"], answer=["Oslo", "Oslo"])
        [1.0, 0.0]
    """
    golds = _references("exact_match_reward", completions, answer, solution, columns)
    scores: list[float | None] = []
    for completion, gold in zip(completions, golds, strict=True):
        text = completion_text(completion)
        stated = extract_answer(text) or text
        scores.append(None if gold is None else float(stated.split() == gold.split()))
    return scores


def _references(
    reward: str,
    completions: Sequence[CompletionLike],
    answer: Sequence[object] | None,
    solution: Sequence[object] | None,
    columns: Mapping[str, object],
) -> list[str | None]:
    """Return the reference of each row, from the first column that holds one."""
    given = {
        name: column
        for name, column in (("answer", answer), ("solution", solution))
        if column is not None
    }
    if not given:
        raise ValueError(
            f"{reward} needs a column 'answer' or 'solution', got {sorted(columns) or 'no columns'}"
        )
    for name, column in (("completions", completions), *given.items()):
        check_column(name, column)
    golds: list[str | None] = [None] * len(completions)
    for name, column in given.items():
        if len(column) != len(completions):
            raise ValueError(
                f"{name} must have one entry per completion = {len(completions)}, got {len(column)}"
            )
        golds = [
            extract_gold(value, name=f"{name}[{row}]") if gold is None else gold
            for row, (gold, value) in enumerate(zip(golds, column, strict=True))
        ]
    return golds
