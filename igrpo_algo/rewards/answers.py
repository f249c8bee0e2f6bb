r"""Find the final answer in a text, and bring its spelling to one form. Text in, text out.

The same reading serves a model's completion and a data set's worked solution, so that a reward, an
evaluation and a data loader agree on what "the answer" is.
"""

import re
from collections import deque
from collections.abc import Collection, Mapping, Sequence, Set
from functools import lru_cache
from typing import Any

from igrpo_kernels.checks import describe

from ..thinking import text_after_thinking
from .remarks import STATED
from .rules import WRITTEN, apply_rules

MAX_CHARACTERS = 1000
"""Longer answers are compared as they stand."""

CompletionLike = str | Sequence[Mapping[str, Any]]

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s{0,3}(?:\{|([^\s{}$\\]{1,40}))")
_BRACES = re.compile(r"\\[\s\S]|[{}]")
_HASHES = re.compile(r"####(?!\s*(?:the |my )?(?:final )?answer[*: ]*\n)", re.IGNORECASE)
_SAID = re.compile(
    r"\banswer\*{0,2}(?: to [^\n.]{1,60}?)?(?: is\b| equals\b| ?[:\uff1a=])[\s:\uff1a*]{0,6}"
    r"|^[#* ]{0,8}(?:the |my )?(?:final )?answer[*: ]{0,4}\n\s{0,6}",
    re.IGNORECASE | re.MULTILINE,
)
_DISPLAYED = re.compile(r"\s*(?:\$\$|\\\[)([\s\S]{1,1000}?)(?:\$\$|\\\])")
_PLAIN_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def completion_text(completion: CompletionLike) -> str:
    """Return the text of a completion: the string, or the content of its last message.

    Args:
        completion: A string, or a list of messages whose content is a string or a list of blocks
            (the text blocks are joined).

    Returns:
        The text.

    Raises:
        TypeError: `completion` is neither.

    Examples:
        >>> completion_text([{"role": "assistant", "content": "42"}])
        '42'
    """
    if isinstance(completion, str):
        return completion
    try:
        content = completion[-1]["content"]
        return content if isinstance(content, str) else "".join(b.get("text", "") for b in content)
    except (TypeError, KeyError, IndexError, AttributeError):
        raise TypeError(
            f"completion must be a string or a list of messages, got {describe(completion)}"
        ) from None


def check_column(name: str, column: Any) -> None:
    """Raise TypeError unless a column is a list, or another collection with an order."""
    if isinstance(column, str | bytes | Set | Mapping) or not isinstance(column, Collection):
        raise TypeError(f"{name} must be a list, got {describe(column)}")


def extract_answer(text: str) -> str | None:
    r"""Return the final answer that a text states, or None where it states none.

    Only the text after the last thinking counts (`thinking.THINKING_MARKS`), and of that only the
    last `<answer>...</answer>` if there is one; thinking that never ends states no answer. The
    answer is then the first of these that the text has: the last `\boxed{...}`; the line after the
    last `####` (GSM8K's mark); the rest of the sentence after the last "answer is" or "answer:",
    or the line below a heading "Final answer"; all of the text inside the answer tag. A last box
    that is empty or never closed states no answer. The rules `remarks.STATED` cut off other words
    around an answer that is not boxed. The time is linear in the length of the text.

    Args:
        text: A completion, or a worked solution.

    Returns:
        The answer as written, without surrounding blanks.

    Examples:
        >>> extract_answer(r"<think>\boxed{1}?</think> Half of it: $\boxed{\frac{1}{2}}$.")
        '\\frac{1}{2}'
        >>> extract_answer("6 * 7 = 42\n#### 42")
        '42'
        >>> extract_answer("The answer is 42, as required.")
        '42'
        >>> extract_answer("I do not know.") is None
        True
    """
    after = text_after_thinking(text)
    if after is None:
        return None
    _, opened, text = after.rpartition("<answer>")
    text, closed, _ = text.partition("</answer>") if opened else (text, "", "")
    box = _last_box(text)
    if box is not None:
        return box or None
    tagged = _cut_out(text.strip()) if closed else None
    return _behind_last_hashes(text) or _last_said(text) or tagged or None


def extract_gold(value: object, *, name: str = "an answer") -> str | None:
    r"""Return the reference answer that a data set's cell holds, or None for an empty cell.

    NaN counts as empty. If the cell is a worked solution, `extract_answer` finds its answer; text
    that marks no answer is the answer itself; a number is written out, 7.0 as 7 (a table with empty
    cells makes floats of whole numbers).

    Args:
        value: A string, a number or None.
        name: What errors call the value.

    Returns:
        The answer as written, without surrounding blanks.

    Raises:
        TypeError: The value is of another type.
        ValueError: The value is an integer of more than 4,300 digits, or infinite.

    Examples:
        >>> extract_gold("It is $2+2=\\boxed{4}$."), extract_gold(" 1,234 "), extract_gold(7)
        ('4', '1,234', '7')
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(f"{name} must be a string, a number or None, got {describe(value)}")
    if value != value:  # NaN is how a table spells a missing number
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    try:
        text = str(value)
    except ValueError as error:
        raise ValueError(f"{name} must have at most 4,300 digits as a number: {error}") from None
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise ValueError(rf"{name} must be finite as a number, got {value}; write '\infty'")
    return extract_answer(text) or text.strip() or None


@lru_cache(maxsize=16384)
def normalize_answer(answer: str) -> str:
    r"""Bring one answer to the spelling in which answers are compared (the rules `rules.WRITTEN`).

    Unicode becomes LaTeX. Math delimiters, bold marks, currency signs, thin spaces, the commas in
    1,000 and a final period are dropped, and blanks collapse. 1e3 becomes 1*10^{3}, and 1 1/4
    becomes 1\frac{1}{4}. A unit stays: `units.split_words` takes it off. An answer of more than
    1,000 characters is returned as it is.

    Args:
        answer: What `extract_answer` returned.

    Returns:
        The normalized answer. Normalizing it again changes nothing.

    Examples:
        >>> [normalize_answer(a) for a in (r"$\$1,200$.", "42 km/h", r"\text{(B)}", "1e3", "2√5")]
        ['1200', '42 km/h', 'B', '1*10^{3}', '2\\sqrt{5}']
    """
    if len(answer) > MAX_CHARACTERS or _PLAIN_NUMBER.fullmatch(answer):
        return answer
    return apply_rules(WRITTEN, answer)


def _last_box(text: str) -> str | None:
    """Return what the last box holds: "" if it is empty or never closed; None without a box."""
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    box = _BOX.match(text, start)
    if box is None or box[1]:
        return box[1].rstrip(".,") if box else ""
    depth = 1
    for token in _BRACES.finditer(text, box.end()):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[box.end() : token.start()].strip()
    return ""


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


def _behind_last_hashes(text: str) -> str | None:
    mark = _last_match(_HASHES, text)
    return _cut_out(_first_line(text[mark.end() :])) if mark else None


def _last_said(text: str) -> str | None:
    said = _last_match(_SAID, text)
    if said is None:
        return None
    sentence = re.split(r"\.(?:\s|$)", _first_line(text[said.end() :]), maxsplit=1)[0]
    if sentence.count("**") % 2:  # the pair began before the answer
        sentence = sentence.replace("**", "", 1)
    return _cut_out(sentence.strip())


def _first_line(text: str) -> str:
    """Return the first line with something in it; displayed mathematics counts as a line."""
    displayed = _DISPLAYED.match(text)
    return displayed[1].strip() if displayed else text.strip().partition("\n")[0]


def _cut_out(statement: str) -> str:
    """Cut an answer out of the words around it."""
    short = len(statement) <= MAX_CHARACTERS and "\n" not in statement
    return apply_rules(STATED, statement).strip() if short else statement
