"""The words around an answer: rules that cut it out of them ("therefore 72, in total").

Rules as those of `rules.py`, each with its cases beside it.
"""

# ruff: noqa: RUF001  (characters that look alike are what it is about)

import re

from .rules import rule


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


VALUE_WORDS = _words(
    "pi sqrt sin cos tan log ln or and to percent choose mod "
    "hundred thousand million billion trillion dozen"
)
"""Words that are part of a value, or that join several."""

_REASONS = _words("which as so hence thus therefore")
_DOUBTS = _words(
    "or but no if unless either neither maybe perhaps possibly almost nearly about wait "
    "actually wrong incorrect other another also both except instead rather alternatively "
    "plus minus times squared cubed over divided"
)
_NUMBER_WORDS = _words(
    "half halves third thirds quarter quarters fourths fifth fifths one two three four five six "
    "seven eight nine ten eleven twelve twenty thirty forty fifty"
)
_SAME = re.compile(r"\W*or (?:about|approximately|roughly|equivalently)\b")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_VALUE = re.compile(r"[\d$\\]|(?<!')\b(?![aI]\b)[A-Za-z]\b")


def _drop_remark(match: re.Match[str]) -> str:
    """Drop words after a value, unless they may name another value or belong to this one."""
    value, remark = match.string[: match.start()], match[0]
    words = re.findall("[a-z]+", remark.lower())
    is_value = re.search(r"\d", value) or not re.search("[A-Za-z]{2}", _COMMAND.sub("", value))
    if value and is_value and (words[0] in ("because", "since", "not") or _SAME.match(remark)):
        return ""
    if not value or not is_value or _DOUBTS.intersection(words):
        return remark
    if words[0] in _REASONS:
        return ""
    in_words = frozenset() if remark.lstrip().startswith("(") else _NUMBER_WORDS
    values = (VALUE_WORDS | in_words) - {"and", "to"}
    names_value = values.intersection(words if words[0] in ("and", "of") else words[:1])
    return remark if names_value or _VALUE.search(remark) else ""


STATED = (
    # Words before the answer.
    rule(
        r"(?i)^(?:[\s:*]*(?:therefore|thus|hence|then|so|indeed|simply|just|clearly|exactly"
        r"|precisely|approximately|equal to|given by"
        r"|(?:the |my )?(?:final |correct )?answer(?: is\b)?)\b[\s:\uff1a,*=]*)+(?=.)",
        "",
        {
            "therefore 72": "72",
            "thus, $72$": "$72$",
            "**Answer:** 42": "42",
            "The answer is 42": "42",
            "so": "so",
        },
    ),
    # Words after it, set off by punctuation, by a bracket or by their first word.
    rule(
        r"(?:\s*[,;:.]\s+|\s+[-–—]+\s+|\s*—\s*|\s+(?=\()"
        r"|\s+(?=(?:and [A-Za-z]{2}|which|as|because|since|so|hence|thus|in (?:total|all)"
        r"|of (?:the|his|her|its|their|all)\b)))"
        r"\(?(?:[A-Za-z]{2}|[aI] ).*",
        _drop_remark,
        {
            "72, which is the total": "72",
            "$72$, as required": "$72$",
            "72; done": "72",
            "42 (the answer)": "42",
            "42 and the steps above confirm that": "42",
            "15 because 3 * 5 = 15": "15",
            "-3 — a loss": "-3",
            "72 or 73": "72 or 73",
            "72, or maybe 73": "72, or maybe 73",
            "5 and $6$": "5 and $6$",
            "x = 1, y = 2": "x = 1, y = 2",
            "5 feet, 3 inches": "5 feet, 3 inches",
            "3 (mod 7)": "3 (mod 7)",
            "7, squared": "7, squared",
            "5 and one half": "5 and one half",
            "72 - ten": "72 - ten",
            "42 (forty-two)": "42",
            "3/4 of the cake": "3/4",
            "3/4 of the dozen": "3/4 of the dozen",
            "5 (not 6)": "5",
            "1/3, or about 0.33": "1/3",
            "42 (million)": "42 (million)",
            "72, Tom has 6 of them": "72, Tom has 6 of them",
            "(A) and (C)": "(A) and (C)",
            "2, 3 and 5, which are prime": "2, 3 and 5",
            "Oslo, Norway": "Oslo, Norway",
        },
    ),
)
