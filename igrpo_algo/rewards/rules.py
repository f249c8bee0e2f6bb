r"""The table of rules by which answers are read, each with its cases beside it.

`WRITTEN` brings an answer's spelling to one form: most equal answers become equal texts, and
math-verify can read the others. A rule is a regular expression and a replacement for its matches;
it changes how an answer is written, not its value. The tests run every case with its rule and
without. `remarks.STATED` has the rules for the words around an answer.
"""

# ruff: noqa: RUF001  (characters that look alike are what it is about)

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Replacement = str | Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class Rule:
    """One rewriting of an answer.

    Attributes:
        pattern: What to look for.
        replacement: What to put there, as in `re.sub`.
        cases: Answers, each with what the whole table turns it into. Those that change come out
            wrong without this rule; the others must stay as they are.
    """

    pattern: re.Pattern[str]
    replacement: Replacement
    cases: dict[str, str]


def rule(pattern: str, replacement: Replacement, cases: dict[str, str]) -> Rule:
    """Make a rule."""
    return Rule(re.compile(pattern), replacement, cases)


def apply_rules(rules: Iterable[Rule], text: str) -> str:
    """Rewrite a text by each rule in turn, again and again until none changes it."""
    previous = None
    while previous != text:
        previous = text
        for each in rules:
            text = each.pattern.sub(each.replacement, text)
    return text


_SYMBOLS = {
    "−‐‑–—": "-", "×": r"\times ", "·⋅∙": r"\cdot ", "÷": "/", "≤⩽": r"\le ", "≥⩾": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∞": r"\infty ", "π": r"\pi ", "°∘": r"^\circ ",
    "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "∠": r"\angle ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "⁄": "/", "。": ".", "\u200b": "",
}  # fmt: skip
_SYMBOL = {symbol: latex for symbols, latex in _SYMBOLS.items() for symbol in symbols}
_DEGREES = {"": "degrees", "C": "celsius", "F": "fahrenheit"}
_TEXT = r"\\(?:text(?:bf|rm|it)?|math(?:rm|bf|it)|mbox|underline)"
_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)"
_DEGREE = r" ?\^ ?(?:\{\\circ ?\}|\\circ) ?"
_VALUE_ALONE = r"(?:[-+*/^.!\d{} ]|\\(?:frac|sqrt|pi|cdot|times)(?![a-z]))"
_SYNONYMS = {
    r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lvert": "|", r"\rvert": "|", "+/-": r"\pm ",
    r"\varnothing": r"\emptyset", r"\textdollar": "", r"\pounds": "",
}  # fmt: skip


def _plain(match: re.Match[str]) -> str:
    return unicodedata.normalize("NFKC", match[0])


def _unwrap(match: re.Match[str]) -> str:
    r"""Take words out of \text{...}, with blanks where they would touch a value."""
    words, before, after = match[1], match.string[: match.start()], match.string[match.end() :]
    if words[:1].isalpha() and words not in ("e", "i") and re.search(r"[\w)}]$", before):
        words = " " + words
    return words + " " if words[-1:].isalpha() and re.match(r"[\w\\]", after) else words


def _repeating(match: re.Match[str]) -> str:
    """Write a repeating decimal as a fraction: 0.1(6) is (16 - 1) / 90."""
    whole, fixed, repeated = match.groups()
    above = int(whole + fixed + repeated) - int(whole + fixed)
    return rf"\frac{{{above}}}{{{10 ** len(fixed) * (10 ** len(repeated) - 1)}}}"


def _fraction(match: re.Match[str]) -> str:
    above, _, below = _plain(match).partition("⁄")
    return rf"\frac{{{above}}}{{{below}}}"


WRITTEN = (
    # Unicode becomes LaTeX.
    rule("[¼-¾⅐-⅞]", _fraction, {"½": r"\frac{1}{2}", "2½": r"2\frac{1}{2}"}),
    rule("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda m: f"^{{{_plain(m)}}}", {"x²": "x^{2}", "10⁻³": "10^{-3}"}),
    rule("[₀-₉]+", lambda m: f"_{{{_plain(m)}}}", {"101₂": "101_{2}"}),
    rule(
        r"([√∛])\s*(?:\(((?:[^()]|\([^()]*\))*)\)|(\d+(?:\.\d+)?|[A-Za-z]))",
        lambda m: rf"\sqrt{'[3]' * (m[1] == '∛')}{{{m[2] or m[3]}}}",
        {"10 - 2√5": r"10 - 2\sqrt{5}", "√(x+1)": r"\sqrt{x+1}", "∛8": r"\sqrt[3]{8}"},
    ),
    rule(
        f"[{''.join(_SYMBOL)}]",
        lambda m: _SYMBOL[m[0]],
        {"−3": "-3", "x ≤ 3": r"x \le 3", "(−∞, 2π)": r"(-\infty , 2\pi )"},
    ),
    rule("[^\x00-\x7f]+", _plain, {"（1，2）": "(1,2)", "１２％": "12%"}),
    # LaTeX and Markdown: what only changes the look, and commands with the same meaning.
    rule(r"\.{3,}|\\[cdlh]?dots[bcimo]?(?![A-Za-z])", r"\\ldots", {"1, ...": r"1, \ldots"}),
    rule(
        "|".join(rf"{re.escape(written)}(?![A-Za-z])" for written in _SYNONYMS),
        lambda m: _SYNONYMS[m[0]],
        {r"\lbrace 1, 2\rbrace": r"\{ 1, 2\}", r"\varnothing": r"\emptyset", "+/- 3": r"\pm 3"},
    ),
    rule(
        r"\\(?:left|right)(?![A-Za-z.])|\\[bB]igg?[lrm]?(?![A-Za-z])|\\displaystyle(?![A-Za-z])"
        r"|\\(?:[hv]space\*?|(?:text)?color)\{[^{}]*\}",
        "",
        {
            r"\left(1, 2\right)": "(1, 2)",
            r"\Bigl[1, 2\Bigr]": "[1, 2]",
            r"\color{red}5": "5",
            r"5\hspace{1em}": "5",
        },
    ),
    rule(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", {r"\dfrac{1}{2}": r"\frac{1}{2}"}),
    rule(r"\\(frac|binom) ?(\d) ?(\d)", r"\\\1{\2}{\3}", {r"\frac 1 2": r"\frac{1}{2}"}),
    rule(
        r"\^ ?(\\(?:sqrt(?:\[\w+\])?|frac\{[^{}]*\})\{[^{}]*\}|\\pi(?![a-z]))",
        r"^{\1}",
        {r"2^\sqrt{2}": r"2^{\sqrt{2}}", r"x^\frac12": r"x^{\frac{1}{2}}"},
    ),
    rule(r"(?<=[\w)}])\*\*(?=[\w({])", "^", {"x**2": "x^2"}),
    rule(
        r"\*\*|(?<!\\)\\[()\[\]]|\\?\$|[€£¥₹]|^Rs\.? ?(?=\d)",
        "",
        {
            "**42**": "42",
            r"\(42\)": "42",
            r"$\$18$": "18",
            "€5": "5",
            "Rs. 500": "500",
            "$a$ and $b$": "a and b",
        },
    ),
    rule(
        rf"(?:{_TEXT}\{{|\{{\\rm )([^{{}}\\]*)\}}",
        _unwrap,
        {
            r"\text{red}": "red",
            r"\mathbf{7}": "7",
            r"\mathrm{e}^2": "e^2",
            r"{\rm e}^2": "e^2",
            r"52_{\text{8}}": "52_{8}",
            r"5\text{cm}^2": "5 cm^2",
            r"5\text{or}6": "5 or 6",
            r"\textbf{(B)}\ 5": "(B) 5",
        },
    ),
    # Numbers.
    rule(
        r"(?<=\d)(?:,\\!\s*|\\!,(?:\\!)?|\{,\}|\\[,;:]|~|_|')(?=\d{3}(?!\d))",
        "",
        {
            r"11,\! 111,\!100": "11111100",
            "1{,}234": "1234",
            r"x+12\,345": "x+12345",
            "1_000": "1000",
        },
    ),
    rule(
        r"^([-+]?[1-9]\d{0,2}(?:\.\d{3})+)(?:(?<=\d\.\d{3}\.\d{3})|,(\d\d?))(?=$| ?[A-Za-z\\%])",
        lambda m: m[1].replace(".", "") + ((m[2] and "." + m[2]) or ""),
        {"1.234.567": "1234567", "1.234,50": "1234.50", "1.234": "1.234", "1,5": "1,5"},
    ),
    rule(
        r"(?<![\d.])(\d+)\.(\d*)\\(?:overline|bar|dot) ?\{?(\d+)\}?",
        _repeating,
        {r"0.1\overline{6}": r"\frac{15}{90}", r"-2.\bar{3}": r"-\frac{21}{9}"},
    ),
    rule(
        r"^([-+]?\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+))(?=$|\.\d|[ ~]*[A-Za-z\\%])",
        lambda m: re.sub("[, ]", "", m[1]),
        {"1,234.5": "1234.5", "1 000 000": "1000000", "1,200 km": "1200 km", "1,2": "1,2"},
    ),
    rule(
        rf"^({_NUMBER})[eE]([-+]?\d{{1,3}})(?=$| [A-Za-z])",
        lambda m: f"{m[1]}*10^{{{int(m[2])}}}",
        {"3e8 m/s": "3*10^{8} m/s", "1e3": "1*10^{3}", "-2.5E-07": "-2.5*10^{-7}"},
    ),
    rule(r"(?<=\d) ?[xX] ?(?=10\^)", r"\\times ", {"1.6 x 10^5": r"1.6\times 10^5"}),
    rule(r"\^ ?(-\d+|-[A-Za-z])(?!\d)", r"^{\1}", {"10^-19": "10^{-19}"}),
    rule(
        r"(?<![\d.,/^_{])(\d+)(?:\\? |~|\\[,;])(\d+)/(\d+)(?![\d./])",
        r"\1\\frac{\2}{\3}",
        {"1 1/4": r"1\frac{1}{4}", "-3 1/2 cm": r"-3\frac{1}{2} cm"},
    ),
    rule(
        rf"(?<=\d) ?(?=\({_VALUE_ALONE}+\))|(?<=\d\)) ?(?=\({_VALUE_ALONE}+\)|\d|\\frac)",
        r"\\cdot ",
        {
            "2(3)": r"2\cdot (3)",
            r"4\left(\frac12\right)": r"4\cdot (\frac{1}{2})",
            r"(2) \frac12": r"(2)\cdot \frac{1}{2}",
        },
    ),
    rule(
        rf"(\\frac\{{\d+\}}\{{\d+\}}) ?(?=\\frac|\({_VALUE_ALONE}+\))",
        r"\1\\cdot ",
        {r"\frac44\frac25": r"\frac{4}{4}\cdot \frac{2}{5}"},
    ),
    rule(r"_ ?(\d)(?![\d.])", r"_{\1}", {r"\log_2 8": r"\log_{2} 8", "x_1": "x_{1}"}),
    rule(
        r"^([^:,()\s]+) ?: ?([^:,()\s]+) ?: ?([^:,()\s]+)$",
        r"((\1)/(\3), (\2)/(\3), 1)",
        {"1:2:3": "((1)/(3), (2)/(3), 1)", "3:4": "3:4"},
    ),
    rule(r"(?<=\d) ?([ap])\. ?m\.?$", r" \1m", {"3:30 p.m.": "3:30 pm"}),
    rule(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi", {"2pi": r"2\pi", "pip": "pip"}),
    rule(r"^(\w+),? ?\(?(?:in )?base[- ]?(\d\d?)\)?$", r"\1_{\2}", {"52 (base 8)": "52_{8}"}),
    rule(
        rf"^({_NUMBER}){_DEGREE}([CF]?)$",
        lambda m: f"{m[1]} {_DEGREES[m[2]]}",
        {"30°": "30 degrees", r"30^{\circ}": "30 degrees", r"20^\circ\text{C}": "20 celsius"},
    ),
    rule(
        rf"\\(sin|cos|tan|cot|sec|csc) ?\(?({_NUMBER}){_DEGREE}\)?",
        r"\\\1(\\frac{\2\\pi}{180})",
        {r"\sin 30°": r"\sin(\frac{30\pi}{180})"},
    ),
    # Sets and choices.
    rule(r"^[a-z] ?\\in ?(?=[\[(])", "", {r"x\in[1, 2]": "[1, 2]"}),
    rule(
        r"^([\[\]])([^][(),;]+,[^][(),;]+)([\[\]])$",
        lambda m: f"{'[(' [m[1] == ']']}{m[2]}{'])' [m[3] == '[']}",
        {"]1, 2[": "(1, 2)", "[1, 2[": "[1, 2)", "[1, 2]": "[1, 2]"},
    ),
    rule(
        r"^\\\{ ?([a-z]) ?(?:\\in ?\\mathbb\{R\} ?)?(?:\||:|\\mid) ?(.+)\\\}$",
        r"\2",
        {r"\{x \mid x < 3\}": "x < 3"},
    ),
    rule(
        r"^(?:\\mathbb\{R\}|(?:all )?real numbers|all reals)$",
        r"(-\\infty,\\infty)",
        {"ℝ": r"(-\infty,\infty)", "all real numbers": r"(-\infty,\infty)"},
    ),
    rule(
        r"^(?:[Oo]ption|[Cc]hoice)? ?\(?([A-Z])\)?$",
        r"\1",
        {r"\text{(B)}": "B", "option C": "C", "Choice (D)": "D"},
    ),
    rule(r"^\\approx ?", "", {"≈ 3.14": "3.14"}),
    # Blanks, and punctuation at the end.
    rule(r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~", " ", {r"(1,\,2)": "(1, 2)"}),
    rule(r"\\!", "", {r"1\!2": "12"}),
    rule(r"\s+", " ", {"a\n b": "a b"}),
    rule(r"^ | $|(?<!\\)[.,;: ]+$|\\+$", "", {" 42. ": "42", "7,": "7", r"5\\": "5"}),
)  # fmt: skip
