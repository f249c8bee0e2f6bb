r"""Take the unit off an answer: "5 km" is 5, and is not "5 m"."""

import re

from .remarks import VALUE_WORDS

# A value, and the words behind it: after a blank, or of two letters and more.
_WORDS_BEHIND = re.compile(
    r"(?P<value>.*?(?:[\d})%!]|\\pi))"
    r"(?: (?P<words>[A-Za-z][A-Za-z0-9 .,/^{}'-]*)|(?P<glued>[A-Za-z]{2,}(?:\^[23])?))"
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
        cup cups
        s sec secs second seconds
        min mins minute minutes
        h hr hrs hour hours
        day days
        week weeks
        month months
        year years
        dollar dollars USD usd
        cent cents
        euro euros EUR eur
        degree degrees deg
        celsius
        fahrenheit
        radian radians rad
        unit units
        people person persons
        way ways
        point points
    """.strip().splitlines()
    for spelling in line.split()
}
_RATES = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h"}
_POWERS = {"square ": "^2", "sq ": "^2", "sq. ": "^2", "cubic ": "^3", "": ""}


def split_words(answer: str) -> tuple[str, str, bool]:
    r"""Split a normalized answer into its value and the unit or other words after it.

    Known are the common units of length, weight, volume, time, money, temperature and angle, their
    squares, cubes and quotients, and a few counts (people, ways, points). A comparison may ignore
    a known unit, but no other words. Words that are part of the value ("3 million", "5 or 6") stay
    with it. So does a single letter without a blank ("5m"), for it may be a variable.

    Args:
        answer: What `normalize_answer` returned.

    Returns:
        The value; the words, with one spelling for each unit; whether they are a known unit. An
        answer without such words yields itself, "" and True.

    Examples:
        >>> split_words("42 kilometers per hour"), split_words(r"\sqrt{3} cm^2")
        (('42', 'km/h', True), ('\\sqrt{3}', 'cm^2', True))
        >>> split_words("2 thirds"), split_words("3 million")
        (('2', 'thirds', False), ('3 million', '', True))
    """
    found = _WORDS_BEHIND.fullmatch(answer)
    if not found or re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", found["value"])):
        return answer, "", True
    words = found["words"] or found["glued"]
    if unit := _canonical_unit(words):
        return found["value"], unit, True
    first = re.match("[A-Za-z.]*", words)
    if first is None or len(first[0]) < 3 or first[0].lower() in VALUE_WORDS or found["glued"]:
        return answer, "", True
    return found["value"], words.casefold(), False


def _canonical_unit(words: str) -> str:
    if words in _RATES:
        return _RATES[words]
    parts = []
    for part in re.split(r"/| per ", words):
        name = part.strip().replace("{", "").replace("}", "")
        prefix = next(p for p in _POWERS if name.startswith(p))
        name, caret, power = name.removeprefix(prefix).partition("^")
        unit = _UNITS.get(name) or _UNITS.get(name.lower(), "")
        if not unit or (caret and power not in ("2", "3")):
            return ""
        parts.append(unit + caret + power + _POWERS[prefix])
    return "/".join(parts)
