"""Markers: the strings that structure a prompt, and that text from a model must not forge.

Control tokens of a tokenizer ("<|im_end|>", "[/INST]", "</s>") and the delimiters of a template. A
tokenizer finds them wherever they stand, so a draft that holds one would end its own turn. Nothing
here needs torch.
"""

import re
from collections.abc import Collection
from functools import lru_cache
from typing import Any


def neutralize(draft: str, markers: Collection[str], *, before: str = "", after: str = "") -> str:
    """Take out of a draft every marker, so that it cannot end its place in the prompt.

    A marker becomes one space (a marker of one character: nothing), again and again until none is
    left, so that halves that meet do not make a new one. Characters at the draft's ends that would
    complete a marker with the text around it are dropped, and so are those that could begin one
    with what follows `after`, which is not known here: a chat template's own marker, as a rule.

    Markers are matched exactly, as tokenizers match special tokens; an added token that the
    tokenizer looks for only after normalization (`AddedToken(normalized=True)`) is matched in the
    draft as it is written.

    Args:
        draft: Text from a model.
        markers: Strings that must not occur: control tokens, delimiters.
        before: The text that the draft will follow.
        after: The text that will follow the draft.

    Returns:
        The draft without markers. In `before + result + after`, whatever follows, no marker
        touches the result.

    Raises:
        TypeError: An argument is no text, or `markers` no collection of strings.
        ValueError: A marker is empty.

    Examples:
        >>> neutralize("42<|im_end|> or <|im_<|im_end|>end|>!", ["<|im_end|>"])
        '42  or <|im_ end|>!'
    """
    for name, value in (("draft", draft), ("before", before), ("after", after)):
        check_text(name, value)
    known = check_markers("markers", markers)
    if not known:
        return draft
    pattern = _any_of(known)
    while (cleaned := pattern.sub(_blank, draft)) != draft:
        draft = cleaned
    while draft and _crosses(before, draft + after, known):
        draft = draft[1:]
    while draft and (
        _crosses(before + draft, after, known)
        or _begins(before + draft + after, known, longer_than=len(after))
    ):
        draft = draft[:-1]
    return draft


def marker_tokens(tokenizer: Any) -> tuple[str, ...]:
    """List the strings that a Hugging Face tokenizer reads as control tokens.

    The named special tokens (`all_special_tokens`) and every added token that is flagged special.
    The first list alone is not enough: Llama 3's names no header token.

    Args:
        tokenizer: A transformers tokenizer. Of a processor, pass its `.tokenizer`.

    Returns:
        The strings, each once, sorted.
    """
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*tokenizer.all_special_tokens, *added}))


def check_text(name: str, value: object) -> None:
    """Raise TypeError if `value` is no string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__} {value!r}")


def check_markers(name: str, value: object) -> frozenset[str]:
    """Return `value` as a set if it is a collection of strings, each with a character or more."""
    if isinstance(value, str) or not isinstance(value, Collection):
        raise TypeError(f"{name} must be a collection of str, got {type(value).__name__} {value!r}")
    for marker in value:
        check_text(f"each of {name}", marker)
        if not marker:
            raise ValueError(f"each of {name} must have at least one character, got ''")
    return frozenset(value)


def _blank(marker: re.Match[str]) -> str:
    # Shorter than what it replaces, so that replacing comes to an end whatever the markers are.
    return " " if len(marker[0]) > 1 else ""


@lru_cache(maxsize=16)
def _any_of(markers: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(markers, key=lambda marker: (-len(marker), marker))
    return re.compile("|".join(map(re.escape, longest_first)))


def _crosses(left: str, right: str, markers: frozenset[str]) -> bool:
    """Whether a marker begins in `left` and ends in `right`."""
    return any(
        marker in left[1 - len(marker) :] + right[: len(marker) - 1]
        for marker in markers
        if len(marker) > 1
    )


def _begins(text: str, markers: frozenset[str], *, longer_than: int) -> bool:
    """Whether more than `longer_than` characters at the end of `text` begin a marker."""
    return any(
        text.endswith(marker[:length])
        for marker in markers
        for length in range(longer_than + 1, len(marker))
    )
