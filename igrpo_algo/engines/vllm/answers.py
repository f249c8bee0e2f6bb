"""Read and check the answers of vLLM servers: nothing in them is trusted.

A server may be old, misconfigured, or another program behind a proxy. A token id out of range or a
NaN would otherwise show up much later, in a loss, with no trace of its source.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from igrpo_kernels.checks import LARGEST_FLOAT32, describe

from .logprobs import PROCESSED, RAW

Kind = TypeVar("Kind")

ROUNDING = 1e-4  # how far above 0 a log-prob may come to lie
EQUAL = 1e-3  # what two log-probs must differ by to tell anything


class Drawn(NamedTuple):
    """One completion as a server gave it; `logprobs` is None where none were asked for."""

    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str


class Answer(NamedTuple):
    """The completions of one prompt, and how many of its tokens were in the prefix cache."""

    completions: list[Drawn]
    prompt_tokens: int
    cached_tokens: int


class Card(NamedTuple):
    """What a server says of its model."""

    name: str
    context: int
    root: str


def read_card(listing: Any, wanted: str | None) -> Card:
    """Find a model in what /v1/models lists; None takes the first.

    Raises:
        LookupError: The server has other models only.
        ValueError: The listing is not what vLLM gives.
    """
    cards = {field(card, "id", str): card for card in field(listing, "data", list)}
    if not cards:
        raise ValueError("data is empty")
    name = next(iter(cards)) if wanted is None else wanted
    if name not in cards:
        raise LookupError(f"no model {wanted!r}, only {sorted(cards)}")
    card = cards[name]
    return Card(name, _count(card, "max_model_len"), field(card, "root", str))


def read_completions(answer: Any, request: Mapping[str, Any], vocabulary: int) -> Answer:
    """Read the answer to a request for completions of one prompt.

    Args:
        answer: The JSON of /v1/completions.
        request: What was asked: `prompt`, `n`, `max_tokens`, and `logprobs` (None: not wanted).
        vocabulary: Token ids must be below this.

    Returns:
        The completions, in the order of their indices.

    Raises:
        ValueError: The answer is not one to this request; the message says why.
    """
    choices = field(answer, "choices", list)
    indices = [field(choice, "index", int) for choice in choices]
    if sorted(indices) != list(range(request["n"])):
        raise ValueError(f"the indices of n = {request['n']} choices are {indices}")
    in_order = sorted(choices, key=lambda choice: choice["index"])
    drawn = [_drawn(choice, request, vocabulary) for choice in in_order]
    usage = field(answer, "usage", dict)
    has_details = usage.get("prompt_tokens_details") is not None
    details = field(usage, "prompt_tokens_details", dict) if has_details else {}
    cached = 0 if details.get("cached_tokens") is None else _count(details, "cached_tokens")
    return Answer(drawn, _count(usage, "prompt_tokens"), cached)


def read_top_logprobs(answer: Any) -> dict[str, float]:
    """Read the most probable first tokens of a completion.

    Raises:
        ValueError: There are none, or they are not log-probs.
    """
    choices = field(answer, "choices", list)
    tops = field(field(choices[0] if choices else {}, "logprobs", dict), "top_logprobs", list)
    top: dict[str, float] = field({"top": tops[0] if tops else None}, "top", dict)
    _check_logprobs("top_logprobs", list(top.values()))
    if not top or sum(map(math.exp, top.values())) > 1 + ROUNDING:
        raise ValueError(f"top_logprobs are not log-probs: {describe(top)}")
    return top


def logprobs_mode(at_one: Mapping[str, float], at_two: Mapping[str, float]) -> str:
    """Tell a server's `logprobs_mode` from its top log-probs at temperatures of 1 and 2.

    log softmax(logits / 2) has gaps half as wide; log-probs from before the temperature do not
    change.

    Raises:
        ValueError: The log-probs are all equal, which tells nothing.

    Examples:
        >>> logprobs_mode({"a": -0.1, "b": -2.3}, {"a": -0.1, "b": -2.3})
        'raw_logprobs'
    """
    both = at_one.keys() & at_two.keys()
    one, two = (
        max(top[t] for t in both) - min(top[t] for t in both) if both else 0.0
        for top in (at_one, at_two)
    )
    if one < EQUAL:
        raise ValueError(f"its most probable tokens are equally probable: {describe(dict(at_one))}")
    return RAW if abs(one - two) < abs(one - 2 * two) else PROCESSED


def field(record: Any, name: str, kind: type[Kind]) -> Kind:
    """Return a field of a JSON object if it has the type (a bool is not an int)."""
    if not isinstance(record, dict):
        raise ValueError(f"{describe(record)} stands where an object with {name!r} should")
    value = record.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        article = "an" if kind is int else "a"
        raise ValueError(f"{name} must be {article} {kind.__name__}, got {describe(value)}")
    return value


def _count(record: Any, name: str) -> int:
    if (count := field(record, name, int)) < 0:
        raise ValueError(f"{name} must be >= 0, got {describe(count)}")
    return count


def _drawn(choice: Any, request: Mapping[str, Any], vocabulary: int) -> Drawn:
    ids: list[Any] = field(choice, "token_ids", list)
    if len(ids) > request["max_tokens"]:
        raise ValueError(f"token_ids holds {len(ids)}, max_tokens was {request['max_tokens']}")
    for place, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise ValueError(
                f"token_ids[{place}] must be an int in [0, {vocabulary}), got {describe(token)}"
            )
    logprobs: list[Any] | None = None
    if request["logprobs"] is not None:
        logprobs = field(field(choice, "logprobs", dict), "token_logprobs", list)
        if len(logprobs) != len(ids):
            raise ValueError(f"{len(logprobs)} token_logprobs for {len(ids)} token_ids")
        _check_logprobs("token_logprobs", logprobs)
        logprobs = [float(each) for each in logprobs]
    if field(choice, "prompt_token_ids", list) != request["prompt"]:
        raise ValueError("prompt_token_ids are not those that were sent")
    if choice.get("finish_reason") not in ("stop", "length"):
        raise ValueError(f"a completion was given up: {choice.get('finish_reason')!r}")
    return Drawn(ids, logprobs, choice["finish_reason"])


def _check_logprobs(name: str, values: Sequence[Any]) -> None:
    for place, value in enumerate(values):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not -LARGEST_FLOAT32 <= value <= ROUNDING:  # NaN is not, either
            raise ValueError(f"{name}[{place}] must be finite and <= 0, got {describe(value)}")
