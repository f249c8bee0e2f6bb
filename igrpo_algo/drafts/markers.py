"""Markers: the strings that structure a prompt, which text from a model must not forge.

Control tokens of a tokenizer ("<|im_end|>", "[/INST]", "</s>"), what a chat template writes around
turns as plain text, and the delimiters of a draft. A tokenizer finds control tokens wherever they
stand, so a draft that holds one would end its own turn. Nothing here needs torch.
"""

import re
from collections.abc import Collection
from functools import lru_cache
from itertools import chain, count
from reprlib import repr as shown  # short, of anything
from typing import Any

from ..thinking import THINKING_MARKS, check_text

WELL_KNOWN_MARKERS = re.compile(
    r"""
      <[|\uff5c] [\w\u2581/-]{2,64} [|\uff5c]?>         # <|im_end|>, DeepSeek's wide bars, <|turn>
    | <[\w\u2581/-]{2,64} [|\uff5c]>                    # <turn|>
    | </?(?:s|bos|eos)> | <(?:start|end)_of_turn>
    | <</?SYS>>
    | \[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT)\]
    """,
    re.VERBOSE,
)
"""How the turns of well-known models are written; `neutralize` knows them without a tokenizer."""

# What else a chat template may write around turns, looked for in its own source only.
_LITERALS = re.compile(
    r"<[^<>\s'\"]{1,64}> | \[/?[A-Z][A-Z_]+\]"
    r"| \#{2,}\ ?(?i:system|user|human|instruction|input|assistant|response)\b:?"
    r"| \b(?i:system|user|human|assistant|bot)\ ?:",
    re.VERBOSE,
)


def neutralize(
    draft: str, markers: Collection[str] = (), *, before: str = "", after: str = ""
) -> str:
    """Remove every marker from a draft, so that it cannot end its place in the prompt.

    Each marker, and each of `WELL_KNOWN_MARKERS`, becomes a character that no marker contains
    (usually a space), so that two halves cannot meet and form a new one. Characters at the draft's
    ends that would complete a marker with the text around it are dropped, and so are those that
    could begin one together with what follows `after`, which is not known here (usually a marker
    of the chat template). The time is linear in the length of the draft.

    Markers are matched exactly, as tokenizers match special tokens; an added token that the
    tokenizer looks for only after normalization (`AddedToken(normalized=True)`) is matched in the
    draft as it is written.

    Args:
        draft: Text from a model.
        markers: Further strings that must not occur: control tokens, delimiters.
        before: The text that the draft will follow.
        after: The text that will follow the draft.

    Returns:
        The draft without markers. In `before + result + after`, whatever follows, no marker
        touches the result.

    Raises:
        TypeError: An argument is not text, or `markers` not a collection of strings.
        ValueError: A marker is empty.

    Examples:
        >>> neutralize("42<|im_end|> or <|im_<|im_end|>end|>!")
        '42  or <|im_ end|>!'
        >>> neutralize("42. USER: and 6 * 9?", ["USER:"])
        '42.   and 6 * 9?'
    """
    for name, value in (("draft", draft), ("before", before), ("after", after)):
        check_text(name, value)
    known = check_markers("markers", markers)
    draft = _pattern(known).sub(_blank(known), draft)
    endings = tuple({tail for head, tail in _halves(known) if before.endswith(head)})
    text, start = draft + after, 0
    while start < len(draft) and text.startswith(endings, start):
        start += 1
    beginnings = _beginnings(known, after)
    lengths = sorted({len(head) for head in beginnings})
    text, end = before + draft[start:], len(before) + len(draft) - start
    while end > len(before) and any(text[max(0, end - n) : end] in beginnings for n in lengths):
        end -= 1
    return text[len(before) : end]


def marker_tokens(tokenizer: Any, chat_template: str | None = None) -> tuple[str, ...]:
    r"""List the strings that would end or begin a turn in the prompts of a model.

    What its tokenizer reads as control tokens: the named special tokens (`all_special_tokens`) and
    every added token that is flagged special (the first list alone is not enough: Llama 3's names
    no header token). And what its chat template writes around turns as plain text ("<|user|>",
    "[INST]", "### Response:"), thinking marks left out.

    Args:
        tokenizer: A transformers tokenizer. Of a processor, pass its `.tokenizer`.
        chat_template: The template; None takes the tokenizer's own.

    Returns:
        The strings, each once, sorted.

    Raises:
        TypeError: `tokenizer` is not one of transformers, or `chat_template` is not a string.

    Examples:
        >>> from types import SimpleNamespace
        >>> template = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
        >>> marker_tokens(
        ...     SimpleNamespace(
        ...         all_special_tokens=["</s>"], added_tokens_decoder={}, chat_template=template
        ...     )
        ... )
        ('</s>', '<|user|>')
    """
    for name in ("all_special_tokens", "added_tokens_decoder", "chat_template"):
        if not hasattr(tokenizer, name):
            raise TypeError(f"tokenizer must have {name}, got {shown(tokenizer)}")
    if not isinstance(chat_template, str | None):
        raise TypeError(f"chat_template must be a string or None, got {shown(chat_template)}")
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    template = tokenizer.chat_template if chat_template is None else chat_template
    sources = template.values() if isinstance(template, dict) else [template or ""]
    # In a template's source a line break inside a string is written as two characters.
    written = {
        match for source in sources for match in _LITERALS.findall(source.replace("\\n", "\n"))
    }
    written -= set(chain.from_iterable(THINKING_MARKS))  # drafts are stripped of their thinking
    return tuple(sorted({*tokenizer.all_special_tokens, *added, *written}))


def check_markers(name: str, value: object) -> frozenset[str]:
    """Return `value` as a set if it is a collection of strings, each with a character or more."""
    if isinstance(value, str) or not isinstance(value, Collection):
        raise TypeError(
            f"{name} must be a collection of str, got {type(value).__name__} {shown(value)}"
        )
    for marker in value:
        check_text(f"each of {name}", marker)
        if not marker:
            raise ValueError(f"each of {name} must have at least one character, got ''")
    return frozenset(value)


@lru_cache(maxsize=16)
def _pattern(markers: frozenset[str]) -> re.Pattern[str]:
    """Match any marker, the longest first; what the well-known shapes cover is not listed again."""
    further = [marker for marker in markers if not WELL_KNOWN_MARKERS.fullmatch(marker)]
    longest_first = sorted(further, key=lambda marker: (-len(marker), marker))
    shapes = f"(?x:{WELL_KNOWN_MARKERS.pattern})"
    return re.compile("|".join([*map(re.escape, longest_first), shapes]))


@lru_cache(maxsize=16)
def _blank(markers: frozenset[str]) -> str:
    """Choose a character that no marker holds: none forms across it, so one pass is enough."""
    candidates = chain(" \n\t", map(chr, count(0xA1)))
    return next(each for each in candidates if not any(each in marker for marker in markers))


@lru_cache(maxsize=16)
def _halves(markers: frozenset[str]) -> frozenset[tuple[str, str]]:
    """Cut each marker in two, in every way."""
    return frozenset((m[:cut], m[cut:]) for m in markers for cut in range(1, len(m)))


@lru_cache(maxsize=16)
def _beginnings(markers: frozenset[str], after: str) -> frozenset[str]:
    """Return the beginnings of markers that `after` completes, or does not contradict."""
    return frozenset(
        head for head, tail in _halves(markers) if after.startswith(tail) or tail.startswith(after)
    )
