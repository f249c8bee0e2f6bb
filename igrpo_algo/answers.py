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
_SAID = re.compile(r"\banswer\*{0,2}(?: is|:)[\s:*]{0,6}", re.IGNORECASE)
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"))
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}\\]*)\}")
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_NUMBER_AND_REST = re.compile(rf"({_NUMBER})([ ~]{{0,3}}(?:[A-Za-z][^\\{{}}]{{0,80}})?)")
_NUMBER_AND_TEXT = re.compile(
    rf"({_NUMBER})[ ~]{{0,3}}\\(?:text|textbf|mathrm|mbox)\{{([^{{}}\\]{{1,80}})\}}"
    r"((?:\^\{?[23]\}?)?)"
)
_ENDING_TEXT = re.compile(
    r"[ ~]{0,3}\\(?:text|textbf|mathrm|mbox)\{([^{}\\]{1,80})\}((?:\^\{?[23]\}?)?)$"
)
_SCIENTIFIC = re.compile(r"([-+]?\d{1,40}(?:\.\d{1,40})?)[eE]([-+]?\d{1,3})")
_CHOICE = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mbox)\{\(([A-Z])\)\}|\(([A-Z])\))"
    r"(?:\\?[ ~]|\\q?quad){0,3}(.{1,1000})"
)
# Words behind a number that math-verify is to read; other words make the answer a text.
_VALUE_WORDS = frozenset(
    {"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "or", "and", "to", "percent", "choose", "mod"}
    | {"hundred", "thousand", "million", "billion", "trillion", "dozen"}
)
# Each line: the spellings of one unit.
_UNITS = {
    spelling: line.split()[0]
    for line in """
        mm millimeter millimeters millimetre millimetres
        cm centimeter centimeters centimetre centimetres
        m meter meters metre metres
        km kilometer kilometers kilometre kilometres
        in inch inches
        ft foot feet
        yd yard yards
        mi mile miles
        mg milligram milligrams
        g gram grams
        kg kilogram kilograms
        lb lbs pound pounds
        oz ounce ounces
        ml mL milliliter milliliters millilitre millilitres
        L l liter liters litre litres
        gallon gallons
        s sec secs second seconds
        min mins minute minutes
        h hr hrs hour hours
        day days
        week weeks
        month months
        year years
        dollar dollars
        cent cents
        euro euros
        mph
        kmh kph
        degree degrees deg
        radian radians rad
        unit units
        people person persons
        way ways
        point points
    """.strip().splitlines()
    for spelling in line.split()
}
_POWERS = {"square ": "^2", "sq ": "^2", "cubic ": "^3", "": ""}


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

    NaN is an empty cell too. A worked solution yields its final answer (`extract_answer`); a cell
    without any mark is the answer itself; a number is written out.

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
    if value is None or value != value:  # NaN is how a table spells a missing number
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(f"an answer must be a string, a number or None, got {value!r}")
    text = str(value)
    return extract_answer(text) or text.strip() or None


def normalize_answer(answer: str) -> str:
    r"""Bring one answer to the spelling that answers are compared in.

    Math delimiters, bold marks and a final period go; `\text{...}` around the whole is unwrapped;
    currency signs and LaTeX thin spaces go; blanks collapse; a number loses the commas between
    its thousands, and words in `\text{...}` behind it stand bare; 1e3 becomes 1*10^{3}. A unit
    stays: `split_unit` takes it off.

    Args:
        answer: What `extract_answer` returned.

    Returns:
        The normalized answer. Normalizing it again changes nothing.

    Example:
        >>> [normalize_answer(a) for a in (r"$\$1,200$.", "42 km/h", r"\text{(B)}", "1e3")]
        ['1200', '42 km/h', 'B', '1*10^{3}']
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
    if scientific := _SCIENTIFIC.fullmatch(answer):
        return f"{scientific[1]}*10^{{{int(scientific[2])}}}"
    if (measure := _NUMBER_AND_TEXT.fullmatch(answer)) and _has_digit(measure[1]):
        answer = f"{measure[1]} {measure[2].strip()}{measure[3].replace('{', '').replace('}', '')}"
    if (number := _NUMBER_AND_REST.fullmatch(answer)) and _has_digit(number[1]):
        return number[1].replace(",", "") + number[2]
    return answer


def split_unit(answer: str) -> tuple[str, str]:
    r"""Take a known unit off the end of a normalized answer.

    Known are common units of length, weight, volume, time, money and angle, their squares, cubes
    and quotients, and a few counts (people, ways, points). Any other word stays with the answer.

    Args:
        answer: What `normalize_answer` returned.

    Returns:
        The value, and the unit in one spelling; "" where there is no known unit.

    Example:
        >>> split_unit("42 kilometers per hour"), split_unit(r"\sqrt{3}\text{ cm}^2")
        (('42', 'km/h'), ('\\sqrt{3}', 'cm^2'))
        >>> split_unit("2 thirds")
        ('2 thirds', '')
    """
    if ending := _ENDING_TEXT.search(answer):
        value, words = answer[: ending.start()], ending[1] + ending[2]
    elif (number := _NUMBER_AND_REST.fullmatch(answer)) and _has_digit(number[1]):
        value, words = number[1], number[2]
    else:
        return answer, ""
    unit = _canonical_unit(words)
    return (value, unit) if value and unit else (answer, "")


def _canonical_unit(words: str) -> str:
    parts = []
    for part in re.split(r"/| per ", words):
        name = part.strip(" ~").replace("{", "").replace("}", "")
        prefix = next(p for p in _POWERS if name.startswith(p))
        name, caret, power = name.removeprefix(prefix).partition("^")
        unit = _UNITS.get(name) or _UNITS.get(name.lower(), "")
        if not unit or (caret and power not in ("2", "3")):
            return ""
        parts.append(unit + caret + power + _POWERS[prefix])
    return "/".join(parts)


def split_choice(answer: str) -> tuple[str, str]:
    r"""Split "(B) 5" into the letter of a choice and its value; ("", answer) for anything else.

    Args:
        answer: What `normalize_answer` returned.

    Returns:
        The letter and the value.

    Example:
        >>> split_choice(r"\textbf{(B)}\ 5"), split_choice("(B, 5)")
        (('B', '5'), ('', '(B, 5)'))
    """
    choice = _CHOICE.fullmatch(answer)
    return (choice[1] or choice[2], choice[3].strip()) if choice else ("", answer)


def has_other_words(answer: str) -> bool:
    """Return whether other words than a unit or a part of the value follow the value.

    Args:
        answer: What `split_unit` left.

    Returns:
        True for "2 thirds" and "8 pm"; False for "2", "2x", "2 pi" and "3 million".

    Example:
        >>> [has_other_words(a) for a in ("2 thirds", "8 pm", "2x", "3 million")]
        [True, True, False, False]
    """
    number, ending = _NUMBER_AND_REST.fullmatch(answer), _ENDING_TEXT.search(answer)
    if ending and ending.start():
        words = " " + ending[1]
    elif number and _has_digit(number[1]):
        words = number[2]
    else:
        return False
    first = re.match(r"[ ~]+([A-Za-z]{2,})", words)
    return first is not None and first[1].lower() not in _VALUE_WORDS


def _has_digit(number: str) -> bool:
    return any(map(str.isdigit, number))


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
    said = re.split(r"\.(?:\s|$)", line, maxsplit=1)[0].strip()
    return (said.removesuffix("**") if said.count("**") % 2 else said) or None
