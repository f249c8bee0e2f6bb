"""Units and other words behind a value."""

import pytest

from igrpo_algo.rewards.units import split_words


@pytest.mark.parametrize(
    ("answer", "value", "words"),
    [
        ("5 km", "5", "km"),
        ("5 kilometers", "5", "km"),
        ("5kg", "5", "kg"),
        ("60 miles per hour", "60", "mi/h"),
        ("9 square feet", "9", "ft^2"),
        ("9 ft^2", "9", "ft^2"),
        ("9 m^{2} per s", "9", "m^2/s"),
        (r"2\sqrt{3} cm^{3}", r"2\sqrt{3}", "cm^3"),
        (r"1\frac{1}{2} hours", r"1\frac{1}{2}", "h"),
        ("1/2 km", "1/2", "km"),
        (r"2\pi cm", r"2\pi", "cm"),
    ],
)
def test_known_units_are_taken_off(answer: str, value: str, words: str) -> None:
    assert split_words(answer) == (value, words, True)


@pytest.mark.parametrize(
    "answer",
    [
        "9 ft^7",
        "5 m less",
        "2",
        "m",
        "2m",
        "3 million",
        "5 or 6",
        "x^2 m",
        "f(2) cm",
        "2 sin x",
        "3 ab",
    ],
)
def test_values_stay_whole(answer: str) -> None:
    assert split_words(answer) == (answer, "", True)


def test_other_words_are_no_units() -> None:
    assert split_words("2 thirds") == ("2", "thirds", False)
    assert split_words("10:30 p.m") == ("10:30", "p.m", False)
    assert split_words("72 Clips") == ("72", "clips", False)
