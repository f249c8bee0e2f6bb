r"""Find the final answer in a text, and bring its spelling to one form. Text in, text out.

The same rule reads a model's completion and a data set's worked solution, so that a reward, an
evaluation and a data loader agree on what "the answer" is.
"""

import re

_THINK_END = "</think>"
_ANSWER_TAG = ("<answer>", "</answer>")
# An escaped character, an opening box, a box around one bare token, or a brace.
_BOX_TOKENS = re.compile(
    r"\\(?:boxed|fbox)[ ]{0,3}\{|\\(?:boxed|fbox)[ ]{1,3}(?P<bare>[^\s{}$\\]{1,40})|\\.|[{}]"
)
_SAID = re.compile(r"\banswer(?: is|:)[ :]{0,3}", re.IGNORECASE)
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}\\]*)\}")
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_NUMBER_AND_UNIT = re.compile(
    rf"({_NUMBER})(?:\s{{1,3}}([A-Za-z]{{2,20}})(?:[ /][A-Za-z]{{1,20}}){{0,3}})?"
)
# Words behind a number that belong to its value.
_NOT_UNITS = frozenset(
    {"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "or", "and", "to"}
    | {"hundred", "thousand", "million", "billion", "trillion", "dozen", "percent", "choose", "mod"}
)


def extract_answer(text: str) -> str | None:
    r"""Return the final answer that a text states, or None where it states none.

    What follows the last `</think>` is read (the whole text where there is no such tag), and of
    that the last `<answer>...</answer>` where there is one. In what is left, the first of these
    that occurs: the last `\boxed{...}` that is closed and not empty; the line behind the last
    `####` (GSM8K's mark); what follows the last "answer is" or "answer:" up to the end of that
    sentence; all of the text inside the answer tag. Time is linear in the length of the text.

    Args:
        text: A completion, or a worked solution.

    Returns:
        The answer as written, without surrounding blanks.

    Example:
        >>> extract_answer(r"<think>\boxed{1}?</think> Half of it: $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
        >>> extract_answer("6 * 7 = 42\n#### 42")
        '42'
        >>> extract_answer("I do not know.") is None
        True
    """
    text = text.rpartition(_THINK_END)[2]
    tagged = _inside_last_tag(text)
    text = text if tagged is None else tagged
    return (
        _last_box(text)
        or _behind_last_hashes(text)
        or _last_said(text)
        or (tagged.strip() or None if tagged is not None else None)
    )


def extract_gold(value: object) -> str | None:
    r"""Return the reference answer that a data set's cell holds, or None for an empty cell.

    A worked solution yields its final answer (`extract_answer`); a cell without any mark is the
    answer itself; a number is written out.

    Args:
        value: A string, a number or None.

    Returns:
        The answer as written, without surrounding blanks.

    Raises:
        TypeError: The cell is of another type.

    Example:
        >>> extract_gold("It is $2+2=\\boxed{4}$."), extract_gold(" 1,234 "), extract_gold(7)
        ('4', '1,234', '7')
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(f"an answer must be a string, a number or None, got {value!r}")
    text = str(value)
    return extract_answer(text) or text.strip() or None


def normalize_answer(answer: str) -> str:
    r"""Bring one answer to the spelling that answers are compared in.

    Math delimiters, bold marks and a final period go; `\text{...}` around the whole is unwrapped;
    currency signs and LaTeX thin spaces go; blanks collapse; a number loses the commas between
    its thousands and the words of its unit ("1,200 apples" is "1200"), except words that are part
    of its value ("2 pi", "3 million").

    Args:
        answer: What `extract_answer` returned.

    Returns:
        The normalized answer. Normalizing it again changes nothing.

    Example:
        >>> [normalize_answer(a) for a in (r"$\$1,200$.", "42 km/h", r"\text{(B)}", "2 pi")]
        ['1200', '42', 'B', '2 pi']
    """
    previous = None
    while previous != answer:
        previous = answer
        answer = _normalize_once(answer)
    return answer


def _normalize_once(answer: str) -> str:
    answer = " ".join(answer.split()).rstrip(". ")
    for opening, closing in _WRAPPERS:
        inner = answer[len(opening) : len(answer) - len(closing)]
        if answer == opening + inner + closing and inner and opening not in inner:
            answer = inner.strip()
    if whole := _TEXT_COMMAND.fullmatch(answer):
        answer = whole[1].strip()
    answer = re.sub(r"\\[!,;]|\\?\$|[€£¥]", "", answer).replace("{,}", ",").strip()
    answer = re.sub(r"^\(([A-Z])\)$", r"\1", answer)
    number = _NUMBER_AND_UNIT.fullmatch(answer)
    if number and any(map(str.isdigit, number[1])) and (number[2] or "").lower() not in _NOT_UNITS:
        return number[1].replace(",", "")
    return answer


def _inside_last_tag(text: str) -> str | None:
    opening, closing = _ANSWER_TAG
    before, closed, _ = text.rpartition(closing)
    _, opened, inside = before.rpartition(opening)
    return inside if closed and opened else None


def _last_box(text: str) -> str | None:
    """Return the content of the box that opens last; one pass with a stack of open braces."""
    found: tuple[int, str] | None = None
    opened: list[int | None] = []
    for token in _BOX_TOKENS.finditer(text):
        start, content = None, ""
        if token["bare"]:
            start, content = token.start(), token["bare"].rstrip(".,")
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append(token.end() if len(token[0]) > 1 else None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            content = "" if start is None else text[start : token.start()].strip()
        if start is not None and content and (found is None or start > found[0]):
            found = (start, content)
    return found[1] if found else None


def _behind_last_hashes(text: str) -> str | None:
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() or None if mark else None


def _last_said(text: str) -> str | None:
    line = _SAID.split(text)[-1].partition("\n")[0] if _SAID.search(text) else ""
    return re.split(r"\.(?:\s|$)", line, maxsplit=1)[0].strip() or None
