"""Find a piece of code in a file and put another in its place, by syntax and not by text.

Both are compared token by token. Layout, comments, quotes, trailing commas and parentheses that
only group make no difference, nor does a rename: where the piece is not found as it is, other names
may stand in it, one for one, as long as more of its names are the same than not.
"""

import ast
import io
import keyword
import re
import tokenize
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from textwrap import dedent
from typing import NamedTuple

LAYOUT = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
OPEN = "(" * 9 + "\n"  # put first: between brackets a tokenizer wants no sound indentation


class Token(NamedTuple):
    """A token, where it starts and ends, and where the parenthesis that it pairs with starts."""

    text: str
    start: int
    end: int
    mate: int | None = None
    counts: bool = True


class Place(NamedTuple):
    """Where a piece stands in the source, and which of its names are written differently there."""

    start: int
    end: int
    renamed: dict[str, str]


def _read(code: str) -> Iterator[Token]:
    """Yield the tokens of code, or of a fragment that leaves brackets open."""
    starts = [-len(OPEN), *accumulate(map(len, code.splitlines(keepends=True)), initial=0)]
    try:
        for token in tokenize.generate_tokens(io.StringIO(OPEN + code).readline):
            name, text = tokenize.tok_name[token.type], token.string
            if name == "STRING":
                text = ast.unparse(ast.parse(text))
            elif name in ("FSTRING_START", "FSTRING_END"):  # tokens of their own since Python 3.12
                text = text.rstrip("\"'")
            if name not in LAYOUT and token.start[0] > 1:
                start, end = (starts[row - 1] + column for row, column in (token.start, token.end))
                yield Token(text, start, end)
    except tokenize.TokenError:  # the end came between brackets, after all tokens
        return


@lru_cache
def split(code: str) -> tuple[Token, ...]:
    """Split code into tokens; commas before a closing bracket and grouping pairs do not count."""
    tokens = list(_read(code))
    opened: list[int] = []
    for index, token in enumerate(tokens):
        if token.text in "([{":
            opened.append(index)
        elif token.text in ")]}":
            if index and tokens[index - 1].text == ",":
                tokens[index - 1] = tokens[index - 1]._replace(counts=False)
            first = opened.pop() if opened else None
            if first is not None and token.text == ")" and _groups(tokens, first, index):
                for one, other in ((first, index), (index, first)):
                    tokens[one] = tokens[one]._replace(mate=tokens[other].start, counts=False)
    return tuple(tokens)


def _groups(tokens: Sequence[Token], first: int, last: int) -> bool:
    """Say whether a pair of parentheses only groups: it holds something, and nothing is called."""
    before = tokens[first - 1].text if first else "="
    return last > first + 1 and not _is_name(before) and before not in (")", "]")


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def find(piece: str, source: str) -> list[Place]:
    """Find all places of a piece: as it is, without its last comma, or under other names."""
    wanted = [token.text for token in split(piece) if token.counts]
    tokens = split(source)
    without_comma = wanted[:-1] if wanted[-1:] == [","] else []
    for may_differ in (False, True):
        if places := list(_places(wanted, tokens, may_differ)):
            return places
        if places := list(_places(without_comma, tokens, may_differ)):
            return [p._replace(end=p.end + source.startswith(",", p.end)) for p in places]
    return []


def _places(piece: list[str], tokens: Sequence[Token], may_differ: bool) -> Iterator[Place]:
    counting = [index for index, token in enumerate(tokens) if token.counts]
    texts = [tokens[index].text for index in counting]
    size = len(piece)
    for at in range(len(texts) - size + 1 if size else 0):
        window = texts[at : at + size]
        renamed = _renamed(piece, window) if may_differ else {} if piece == window else None
        if renamed is None:
            continue
        if span := _balanced(tokens, counting[at], counting[at + size - 1]):
            yield Place(*span, renamed)


def _balanced(tokens: Sequence[Token], first: int, last: int) -> tuple[int, int] | None:
    """Take in the other halves of the grouping pairs inside; None where more lies between."""
    start, end = tokens[first].start, tokens[last].end
    mates = [token.mate for token in tokens[first : last + 1] if token.mate is not None]
    low, high = min([start, *mates]), max([end, *(mate + 1 for mate in mates)])
    swallowed = [t for t in tokens if low <= t.start < start or end <= t.start < high]
    return None if any(token.counts for token in swallowed) else (low, high)


def _renamed(piece: list[str], window: list[str]) -> dict[str, str] | None:
    """Say which names differ, or None where anything else does, or too many do."""
    names: dict[str, str] = {}
    for ours, theirs in zip(piece, window, strict=True):
        if _is_name(ours) and _is_name(theirs):
            if names.setdefault(ours, theirs) != theirs:
                return None
        elif ours != theirs:
            return None
    renamed = {ours: theirs for ours, theirs in names.items() if ours != theirs}
    one_for_one = len(set(names.values())) == len(names)
    return renamed if one_for_one and 2 * len(renamed) < len(names) else None


def replace(source: str, place: Place, new: str) -> str:
    """Put new code in a place; whole statements take the indentation that they find there."""
    before = source[source.rfind("\n", 0, place.start) + 1 : place.start]
    if not before.strip():
        new = dedent(new).strip().replace("\n", f"\n{before}") if _is_whole(new) else new.lstrip()
    if place.renamed:
        known = r"\b(?:{})\b".format("|".join(map(re.escape, place.renamed)))
        new = re.sub(known, lambda name: place.renamed[name[0]], new)
    return source[: place.start] + new.rstrip() + source[place.end :]


def _is_whole(new: str) -> bool:
    """Say whether code is statements, or headers that lack a block, and no fragment."""
    for block in ("", " pass"):
        try:
            ast.parse(dedent(new).strip() + block)
        except SyntaxError:
            continue
        return True
    return False
