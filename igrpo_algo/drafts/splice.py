"""How a chosen draft gets into its prompt, as a value: `TextSplice` and `TokenSplice`.

A splice is any function `(prompt, draft) -> Spliced`. These two first strip the draft of thinking
or control tokens and cut it to length.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from igrpo_kernels.checks import check_callable, check_count, describe

from ..fields import check_fields
from ..prompts import Prompt, check_chat_template_kwargs, check_ids, encode_prompt
from ..thinking import strip_thinking
from .budget import Keep, check_keep, fit_draft, truncate_draft
from .markers import check_markers
from .text import DEFAULT_TEMPLATE, DraftTemplate, splice_cleaned


class Draft(Protocol):
    """The part of a completion that a splice reads."""

    @property
    def text(self) -> str:
        """The text of its tokens, without special tokens."""
        ...

    @property
    def token_ids(self) -> list[int]:
        """Its tokens as sampled."""
        ...


def check_draft(draft: object) -> None:
    """Raise TypeError unless a splice can read the draft."""
    if not isinstance(getattr(draft, "text", None), str) or not hasattr(draft, "token_ids"):
        raise TypeError(f"draft must have a text and token_ids, got {describe(draft)}")


class Spliced(NamedTuple):
    """A Stage-2 prompt.

    Attributes:
        prompt: The question and the draft; the question alone where nothing of the draft is left.
        draft: The draft as it stands in the prompt, as text; empty where nothing is left of it.
        tokens_cut: Draft tokens that were cut off for length.
    """

    prompt: Prompt
    draft: str
    tokens_cut: int


Splice = Callable[[Any, Draft], Spliced]


@dataclass(frozen=True)
class TokenBudget:
    """The maximum number of tokens of a draft, and of the prompt around it.

    Attributes:
        tokenizer: Hugging Face's interface: called on text, `decode`, `apply_chat_template`.
        max_draft_tokens: Maximum tokens of the draft (after its thinking is stripped); None sets no
            limit.
        max_prompt_tokens: Maximum tokens of the spliced prompt as the model sees it, with the chat
            template; the draft is cut to fit, the question never is. None sets no limit.
        keep: Which end of a draft that is too long to keep: "tail" (the answer) or "head".
        chat_template_kwargs: Passed to the chat template.

    Raises:
        TypeError: A limit is not an int.
        ValueError: A limit is below 1, or there is none, or `keep` is neither.

    Examples:
        >>> class Bytes:
        ...     def __call__(self, text, add_special_tokens=True):
        ...         return {"input_ids": list(text.encode())}
        ...     def decode(self, ids):
        ...         return bytes(ids).decode()
        >>> TokenBudget(Bytes(), max_draft_tokens=5).cut("so it is 5.")
        ('is 5.', 6)
    """

    tokenizer: Any
    max_draft_tokens: int | None = None
    max_prompt_tokens: int | None = None
    keep: Keep = "tail"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_draft_tokens is None and self.max_prompt_tokens is None:
            raise ValueError("max_draft_tokens or max_prompt_tokens must be given, got neither")
        _check_limits(self)
        check_callable("tokenizer", self.tokenizer)
        check_chat_template_kwargs(self.chat_template_kwargs)

    def encode(self, text: str) -> list[int]:
        """Return the ids of text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids."""
        return str(self.tokenizer.decode(ids))

    def cut(self, text: str) -> tuple[str, int]:
        """Cut text to `max_draft_tokens`; give what is left, and how many tokens went."""
        ids = self.encode(text) if self.max_draft_tokens is not None else []
        if self.max_draft_tokens is None or len(ids) <= self.max_draft_tokens:
            return text, 0
        kept = truncate_draft(ids, self.max_draft_tokens, keep=self.keep)
        # A cut may fall inside a character of several tokens, which decodes to a replacement mark.
        return self.decode(kept).strip("\ufffd"), len(ids) - len(kept)

    def encode_prompt(self, prompt: Any) -> list[int]:
        """Return the ids of a prompt as a model sees it."""
        return encode_prompt(prompt, self.tokenizer, self.chat_template_kwargs)


def _check_limits(limits: "TokenBudget | TokenSplice") -> None:
    for name in ("max_draft_tokens", "max_prompt_tokens"):
        if getattr(limits, name) is not None:
            check_count(name, getattr(limits, name))
    check_keep(limits.keep)


@dataclass(frozen=True)
class TextSplice:
    r"""Splices the draft's text into a string or a list of chat messages.

    strip, cut to `max_draft_tokens`, `splice_prompt`, cut to `max_prompt_tokens`. Where nothing is
    left of the draft (it was all thinking or control tokens, or the question leaves it no room),
    the prompt stays plain.

    Attributes:
        template: The words around the draft.
        strip: What to keep of the draft: `strip_thinking` keeps the answer; None keeps all. A
            draft cut off in its thinking has no answer, and nothing of it is left.
        special_tokens: Strings that the tokenizer reads as control tokens, taken out of the draft.
            See `marker_tokens`.
        budget: Token limits; None cuts nothing.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: One of `special_tokens` is empty.

    Examples:
        >>> from igrpo_algo import Completion
        >>> splice = TextSplice(DraftTemplate("\nEarlier: ", "\nBetter:"))
        >>> splice("2 + 3?", Completion([], "<think>Hm.</think>6")).prompt
        '2 + 3?\nEarlier: 6\nBetter:'
    """

    template: DraftTemplate = DEFAULT_TEMPLATE
    strip: Callable[[str], str] | None = strip_thinking
    special_tokens: Collection[str] = ()
    budget: TokenBudget | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_markers("special_tokens", self.special_tokens)

    def __call__(self, prompt: Prompt, draft: Draft) -> Spliced:
        """Return the spliced prompt.

        Raises:
            TypeError: The prompt is a list of token ids.
            ValueError: A conversation has no user message.
        """
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], Mapping):
            raise TypeError("prompt is a list of token ids: pass splice=TokenSplice(...)")
        check_draft(draft)
        text, cut = draft.text if self.strip is None else self.strip(draft.text), 0
        if self.budget is not None:
            text, cut = self._fit(prompt, text, self.budget)
        spliced, shown = self._splice(prompt, text)
        if not shown.strip():
            return Spliced(prompt, "", cut)
        return Spliced(spliced, shown, cut)

    def _splice(self, prompt: Any, text: str) -> tuple[Any, str]:
        return splice_cleaned(
            prompt, text, template=self.template, special_tokens=self.special_tokens
        )

    def _fit(self, prompt: Any, text: str, budget: TokenBudget) -> tuple[str, int]:
        """Cut the text to the draft's own limit, then to the prompt's; count the tokens cut."""
        text, cut = budget.cut(text)
        if budget.max_prompt_tokens is None:
            return text, cut
        fitted = fit_draft(
            text,
            lambda piece: budget.encode_prompt(self._splice(prompt, piece)[0]),
            encode=budget.encode,
            decode=budget.decode,
            max_prompt_tokens=budget.max_prompt_tokens,
            keep=budget.keep,
        )
        return fitted.draft, cut + fitted.tokens_cut


DEFAULT_SPLICE = TextSplice()


@dataclass(frozen=True)
class TokenSplice:
    """Splices the draft's own token ids into a list of token ids: q + before + draft + after.

    The ids stay as the model sampled them, so an engine's prefix cache can hold them. Without a
    tokenizer the text of a cut draft is unknown: `Spliced.draft` is then the text of the whole.

    Attributes:
        before_ids: Between question and draft.
        after_ids: What follows the draft, the assistant's turn included.
        special_ids: Control tokens, dropped from the draft (its stop token, say).
        max_draft_tokens: Maximum tokens of the draft; None sets no limit.
        max_prompt_tokens: Maximum tokens of the spliced prompt; the draft is cut, never the
            question.
        keep: Which end of a draft that is too long to keep: "tail" or "head".

    Raises:
        TypeError: Ids are not a collection of int, or a limit is not an int.
        ValueError: An id is negative, a limit is below 1, or `keep` is neither.

    Examples:
        >>> from igrpo_algo import Completion
        >>> TokenSplice((5,), (6,), special_ids=(0,))([1, 2], Completion([7, 8, 0], "seven")).prompt
        [1, 2, 5, 7, 8, 6]
    """

    before_ids: tuple[int, ...] = ()
    after_ids: tuple[int, ...] = ()
    special_ids: Collection[int] = ()
    max_draft_tokens: int | None = None
    max_prompt_tokens: int | None = None
    keep: Keep = "tail"

    def __post_init__(self) -> None:
        check_fields(self)
        _check_limits(self)
        check_ids("before_ids", self.before_ids)
        check_ids("after_ids", self.after_ids)
        check_ids("special_ids", list(self.special_ids))

    def __call__(self, prompt: Prompt, draft: Draft) -> Spliced:
        """Return the spliced prompt.

        Raises:
            TypeError: The prompt is not a list of token ids.
        """
        if isinstance(prompt, str) or (
            isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping)
        ):
            raise TypeError("prompt is not a list of token ids: pass splice=TextSplice(...)")
        check_ids("prompt", prompt)
        check_draft(draft)
        ids = [token for token in draft.token_ids if token not in self.special_ids]
        room = len(ids) if self.max_draft_tokens is None else self.max_draft_tokens
        if self.max_prompt_tokens is not None:
            around = len(prompt) + len(self.before_ids) + len(self.after_ids)
            room = min(room, max(0, self.max_prompt_tokens - around))
        kept = truncate_draft(ids, room, keep=self.keep)
        if not kept:
            return Spliced(prompt, "", len(ids))
        spliced = [*prompt, *self.before_ids, *kept, *self.after_ids]
        return Spliced(spliced, draft.text, len(ids) - len(kept))
