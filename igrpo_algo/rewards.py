r"""Rewards with TRL's signature: reward(prompts=..., completions=..., **columns) -> scores.

`completions` holds strings or lists of messages, `columns` the other columns of the data set, one
entry per completion. A score of None says "cannot be scored": such a completion enters no mean,
no standard deviation and no draft selection. Texts are untrusted: nothing here evaluates them,
and every scan is linear in their length.
"""

import functools
import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .answers import (
    extract_answer,
    extract_gold,
    has_other_words,
    normalize_answer,
    split_choice,
    split_unit,
)
from .math_judge import shared_judge
from .rollouts.scoring import Reward

CompletionLike = str | Sequence[Mapping[str, Any]]

_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_PRODUCT = re.compile(r"[abcxyz]{2}|[b-df-hj-np-tv-z]{2}", re.IGNORECASE)


def completion_text(completion: CompletionLike) -> str:
    """Return the text of a completion: the string, or the content of its last message.

    Args:
        completion: A string, or a list of messages whose content is a string or a list of blocks
            (the text blocks are joined).

    Returns:
        The text.

    Raises:
        TypeError: It is neither.

    Example:
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
            f"a completion must be a string or a list of messages, got {completion!r}"
        ) from None


def math_reward(
    completions: Sequence[CompletionLike],
    *,
    answer: Sequence[object] | None = None,
    solution: Sequence[object] | None = None,
    **columns: object,
) -> list[float | None]:
    r"""Score 1 where the final answer equals the reference, 0 where it does not.

        R(o) = 1[extract(o) = a]

    Both sides are found by `extract_answer` (answer tags, `\boxed{}`, `####`, "the answer is")
    and normalized by `normalize_answer`; equal spellings are equal, anything else is decided by
    math-verify in a process that is killed at a deadline (0.5 equals \frac{1}{2}).

    A known unit (`split_unit`) is dropped where the other side has none or the same; "5 km" is not
    "5 m". A number with other words ("2 thirds", "8 pm", "72 clips") and a reference made of words
    are compared as text, without regard to case; two letters are a product ("xy" equals "yx")
    where both are consonants or of a, b, c, x, y, z, and a word ("no") otherwise. "(B) 5" counts
    as B against a letter and as 5 against a value. math-verify is lenient: 50\% equals both 50 and
    0.5, 3/4 equals 3:4, x = 2 equals 2 and b equals B. A completion that states no answer,
    cannot be parsed or exceeds the deadline scores 0. A reference that is empty or no mathematics
    scores None for each completion that is not spelled like it.

    Source: iGRPO, arXiv:2602.09000, Eq. 6; the extraction rule is ours.

    Args:
        completions: One per row: a string or a list of messages.
        answer: Reference answers; goes before `solution` where both are given.
        solution: Worked solutions, or answers under that name.
        **columns: Whatever else a trainer passes; ignored.

    Returns:
        One score per completion.

    Raises:
        ModuleNotFoundError: math-verify is needed and not installed.
        TypeError: A completion or a reference is of a type that holds no text.
        ValueError: Neither column is given, or its length differs from that of `completions`.

    Example:
        >>> math_reward([r"\boxed{\frac{1}{2}}", "#### 3", "Hm."], answer=["0.5", "4", "1"])
        [1.0, 0.0, 0.0]
    """
    golds = _reference("math_reward", completions, answer, solution, columns)
    return [
        _score_math(extract_gold(gold), extract_answer(completion_text(completion)))
        for completion, gold in zip(completions, golds, strict=True)
    ]


def _score_math(gold: str | None, answer: str | None) -> float | None:
    if gold is None:
        return None
    equal = _equal_answers(normalize_answer(gold), normalize_answer(answer or ""))
    return None if equal is None else float(equal)


@functools.lru_cache(maxsize=16384)
def _equal_answers(gold: str, answer: str) -> bool | None:
    if gold == answer:
        return True
    gold_letter, gold_value = split_choice(gold)
    letter, value = split_choice(answer)
    if gold_letter and letter:
        return gold_letter == letter
    if gold_letter:
        gold = gold_letter if _is_letter(answer) else gold_value
    if letter:
        answer = letter if _is_letter(gold) else value
    return _equal_values(gold, answer)


def _equal_values(gold: str, answer: str) -> bool | None:
    (gold, gold_unit), (answer, unit) = split_unit(gold), split_unit(answer)
    if gold_unit and unit and gold_unit != unit:
        return False
    if _is_text(gold) or has_other_words(answer):
        return gold.casefold() == answer.casefold()
    return shared_judge().equal(gold, answer)


def _is_letter(answer: str) -> bool:
    return len(answer) == 1 and answer.isalpha()


def _is_text(answer: str) -> bool:
    if not _WORDS.fullmatch(answer):
        return has_other_words(answer)
    return max(map(len, re.split("[ '-]", answer))) >= 2 and not _PRODUCT.fullmatch(answer)


def exact_match_reward(
    completions: Sequence[CompletionLike],
    *,
    answer: Sequence[object] | None = None,
    solution: Sequence[object] | None = None,
    **columns: object,
) -> list[float | None]:
    """Score 1 where the final answer is spelled like the reference, 0 where it is not.

    As `math_reward`, without any mathematics: both sides are cut out by `extract_answer` (the
    whole completion where it marks no answer) and compared after their blanks are collapsed.

    Args:
        completions: One per row: a string or a list of messages.
        answer: Reference answers; goes before `solution` where both are given.
        solution: Worked solutions, or answers under that name.
        **columns: Whatever else a trainer passes; ignored.

    Returns:
        One score per completion; None where the reference is empty.

    Raises:
        TypeError: A completion or a reference is of a type that holds no text.
        ValueError: Neither column is given, or its length differs from that of `completions`.

    Example:
        >>> exact_match_reward(["The answer is  Oslo.", "Bergen"], answer=["Oslo", "Oslo"])
        [1.0, 0.0]
    """
    golds = _reference("exact_match_reward", completions, answer, solution, columns)
    scores: list[float | None] = []
    for completion, value in zip(completions, golds, strict=True):
        gold, text = extract_gold(value), completion_text(completion)
        stated = extract_answer(text) or text
        scores.append(None if gold is None else float(stated.split() == gold.split()))
    return scores


def format_reward(
    completions: Sequence[CompletionLike], *, think_opened: bool = False, **columns: object
) -> list[float]:
    """Score 1 for `<think>...</think>` followed by `<answer>...</answer>` and nothing else.

    Each of the four tags occurs once, in this order, with text inside both pairs; blanks may stand
    before, between and after. Checked by counting and searching, not by a regular expression.

    Source: iGRPO, arXiv:2602.09000, App. C, which names a format reward and the tags; the exact
    rule is ours.

    Args:
        completions: One per row: a string or a list of messages.
        think_opened: The chat template writes `<think>` itself, so completions lack it.
        **columns: Whatever else a trainer passes; ignored.

    Returns:
        One score per completion.

    Raises:
        TypeError: A completion is neither a string nor a list of messages.

    Example:
        >>> format_reward(["<think>6 * 7</think> <answer>42</answer>", "<answer>42</answer>"])
        [1.0, 0.0]
    """
    prefix = "<think>" if think_opened else ""
    return [float(_is_formatted(prefix + completion_text(c))) for c in completions]


def opened_format_reward(completions: Sequence[CompletionLike], **columns: object) -> list[float]:
    """Score as `format_reward` where the chat template has written `<think>` already.

    Args:
        completions: One per row: a string or a list of messages.
        **columns: Whatever else a trainer passes; ignored.

    Returns:
        One score per completion.

    Example:
        >>> opened_format_reward(["6 * 7</think><answer>42</answer>"])
        [1.0]
    """
    return format_reward(completions, think_opened=True)


def _is_formatted(text: str) -> bool:
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if any(text.count(tag) != 1 for tag in tags):
        return False
    before, _, rest = text.partition("<think>")
    thought, thought_closed, rest = rest.partition("</think>")
    between, answer_opened, rest = rest.partition("<answer>")
    answer, answer_closed, after = rest.partition("</answer>")
    in_order = bool(thought_closed and answer_opened and answer_closed)
    filled = bool(thought.strip() and answer.strip())
    return in_order and filled and not (before + between + after).strip()


BUILT_IN_REWARDS: Mapping[str, Reward] = {
    "math": math_reward,
    "exact": exact_match_reward,
    "format": format_reward,
    "format-opened": opened_format_reward,
}


def load_reward(name: str) -> Reward:
    """Return a built-in reward by its name, or any Python callable by `module:function`.

    The module is imported as `python -m` would: the current directory counts. The name is a
    person's choice and runs that person's code; never pass one that came from a model or data set.

    Args:
        name: "math", "exact", "format", "format-opened", or "package.module:function".

    Returns:
        The callable.

    Raises:
        ImportError: The module cannot be imported.
        TypeError: What the name leads to is not callable.
        ValueError: The name is no built-in and has no colon, or the module has no such attribute.

    Example:
        >>> load_reward("format") is format_reward
        True
        >>> load_reward("igrpo_algo.rewards:math_reward").__name__
        'math_reward'
    """
    if name in BUILT_IN_REWARDS:
        return BUILT_IN_REWARDS[name]
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise ValueError(
            f"reward must be one of {', '.join(BUILT_IN_REWARDS)} or module:function, got {name!r}"
        )
    target: Any = _import_from_here(module_name)
    for part in path.split("."):
        if not hasattr(target, part):
            raise ValueError(f"reward {name!r}: {module_name} has no attribute {path!r}")
        target = getattr(target, part)
    if not callable(target):
        raise TypeError(f"reward {name!r} must be callable, got {type(target).__name__}")
    return target


def _import_from_here(module_name: str) -> object:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"reward module {module_name!r} could not be imported from {here}: {error}"
        ) from error


def _reference(
    reward: str,
    completions: Sequence[CompletionLike],
    answer: Sequence[object] | None,
    solution: Sequence[object] | None,
    columns: Mapping[str, object],
) -> Sequence[object]:
    name, golds = ("answer", answer) if answer is not None else ("solution", solution)
    if golds is None:
        raise ValueError(
            f"{reward} needs a column 'answer' or 'solution', got {sorted(columns) or 'no columns'}"
        )
    if len(golds) != len(completions):
        raise ValueError(
            f"{name} must have one entry per completion = {len(completions)}, got {len(golds)}"
        )
    return golds
