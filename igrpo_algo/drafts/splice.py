"""How a chosen draft gets into its prompt, as a value: `TextSplice` and `TokenSplice`.

A splice is any function `(prompt, draft: Completion) -> Spliced`. These two put `splice_prompt` and
`splice_prompt_ids` together with what is done to the draft first: thinking stripped, length cut.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from igrpo_kernels.checks import check_count

from ..prompts import Prompt, check_chat_template_kwargs, encode_prompt
from ..rollouts.completions import Completion
from .budget import draft_budget, fit_draft, splice_prompt_ids
from .select import Keep, check_keep, truncate_draft
from .text import DEFAULT_TEMPLATE, DraftTemplate, splice_prompt, strip_thinking


class Spliced(NamedTuple):
    """A Stage-2 prompt.

    Attributes:
        prompt: The question and the draft.
        draft: What is left of the draft, as text; empty where nothing is.
        tokens_cut: Draft tokens that were cut off for length.
    """

    prompt: Prompt
    draft: str
    tokens_cut: int


Splice = Callable[[Any, Completion], Spliced]


@dataclass(frozen=True)
class TokenBudget:
    """How many tokens a draft, and the prompt it stands in, may have.

    Attributes:
        tokenizer: Hugging Face's interface: called on text, `decode`, `apply_chat_template`.
        max_draft_tokens: Most tokens of the draft (after its thinking is stripped); None sets no
            limit.
        max_prompt_tokens: Most tokens of the spliced prompt as the model sees it, chat template
            included; the draft is cut to fit, the question never is. None sets no limit.
        keep: Which end of a draft that is too long to keep: "tail" (the answer) or "head".
        chat_template_kwargs: Passed to the chat template.

    Raises:
        TypeError: A limit is no int.
        ValueError: A limit is below 1, or there is none, or `keep` is neither.
    """

    tokenizer: Any
    max_draft_tokens: int | None = None
    max_prompt_tokens: int | None = None
    keep: Keep = "tail"
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_draft_tokens is None and self.max_prompt_tokens is None:
            raise ValueError("max_draft_tokens or max_prompt_tokens must be given, got neither")
        for name in ("max_draft_tokens", "max_prompt_tokens"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_keep(self.keep)
        check_chat_template_kwargs(self.chat_template_kwargs)

    def encode(self, text: str) -> list[int]:
        """Give the ids of text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """Give the text of ids."""
        return str(self.tokenizer.decode(ids))

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Give the ids of a prompt as a model is shown it."""
        return encode_prompt(prompt, self.tokenizer, self.chat_template_kwargs)


@dataclass(frozen=True)
class TextSplice:
    r"""Splices the draft's text into a string or a list of chat messages.

    strip, cut to `max_draft_tokens`, `splice_prompt`, cut to `max_prompt_tokens`. A draft of which
    nothing is left counts as none.

    Attributes:
        template: The words around the draft.
        strip: What to keep of the draft: `strip_thinking` keeps the answer; None keeps all. A
            draft cut off in its thinking has no answer, and nothing of it is left.
        special_tokens: Strings that the tokenizer reads as control tokens, taken out of the draft.
            See `marker_tokens`.
        budget: Token limits; None cuts nothing.

    Examples:
        >>> splice = TextSplice(DraftTemplate("\nEarlier: ", "\nBetter:"))
        >>> splice("2 + 3?", Completion([], "<think>Hm.</think>6")).prompt
        '2 + 3?\nEarlier: 6\nBetter:'
    """

    template: DraftTemplate = DEFAULT_TEMPLATE
    strip: Callable[[str], str] | None = strip_thinking
    special_tokens: Collection[str] = ()
    budget: TokenBudget | None = None

    def __call__(self, prompt: Prompt, draft: Completion) -> Spliced:
        """Return the spliced prompt.

        Raises:
            TypeError: The prompt is a list of token ids.
            ValueError: The question alone exceeds `max_prompt_tokens`.
        """
        if not isinstance(prompt, str) and not isinstance(prompt[0], Mapping):
            raise TypeError("prompt is a list of token ids: pass splice=TokenSplice(...)")
        text = draft.text if self.strip is None else self.strip(draft.text)
        if self.budget is None:
            return Spliced(self._splice(prompt, text), text, 0)
        text, cut = _cut(text, self.budget)
        if self.budget.max_prompt_tokens is None:
            return Spliced(self._splice(prompt, text), text, cut)
        budget = self.budget
        fitted = fit_draft(
            text,
            lambda piece: budget.encode_prompt(self._splice(prompt, piece)),
            encode=budget.encode,
            decode=budget.decode,
            max_prompt_tokens=self.budget.max_prompt_tokens,
            keep=budget.keep,
        )
        spliced = self._splice(prompt, fitted.draft)
        return Spliced(spliced, fitted.draft, cut + fitted.tokens_cut)

    def _splice(self, prompt: Any, text: str) -> Prompt:
        spliced: Prompt = splice_prompt(
            prompt, text, template=self.template, special_tokens=self.special_tokens
        )
        return spliced


DEFAULT_SPLICE = TextSplice()


@dataclass(frozen=True)
class TokenSplice:
    """Splices the draft's own token ids into a list of token ids: q + before + draft + after.

    The ids stay those that the model sampled, so an engine's prefix cache can hold them.

    Attributes:
        before_ids: What stands between question and draft.
        after_ids: What follows the draft, the assistant's turn included.
        special_ids: Control tokens, dropped from the draft (its stop token, say).
        max_draft_tokens: Most tokens of the draft; None sets no limit.
        max_prompt_tokens: Most tokens of the spliced prompt; the draft is cut, the question never.
        keep: Which end of a draft that is too long to keep: "tail" or "head".

    Examples:
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
        for name in ("max_draft_tokens", "max_prompt_tokens"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_keep(self.keep)

    def __call__(self, prompt: Prompt, draft: Completion) -> Spliced:
        """Return the spliced prompt.

        Raises:
            TypeError: The prompt is no list of token ids.
            ValueError: The question alone exceeds `max_prompt_tokens`.
        """
        if isinstance(prompt, str) or isinstance(prompt[0], Mapping):
            raise TypeError("prompt is no list of token ids: pass splice=TextSplice(...)")
        ids = [token for token in draft.token_ids if token not in self.special_ids]
        room = len(ids) if self.max_draft_tokens is None else self.max_draft_tokens
        if self.max_prompt_tokens is not None:
            bridge = len(self.before_ids) + len(self.after_ids)
            room = min(room, draft_budget(self.max_prompt_tokens, len(prompt), bridge))
        kept = truncate_draft(ids, room, keep=self.keep)
        spliced = splice_prompt_ids(
            prompt, kept, before_ids=self.before_ids, after_ids=self.after_ids
        )
        return Spliced(spliced, draft.text if kept else "", len(ids) - len(kept))


def _cut(text: str, budget: TokenBudget) -> tuple[str, int]:
    """Cut text to the draft's own limit; say how many tokens went."""
    ids = budget.encode(text) if budget.max_draft_tokens is not None else []
    if budget.max_draft_tokens is None or len(ids) <= budget.max_draft_tokens:
        return text, 0
    kept = truncate_draft(ids, budget.max_draft_tokens, keep=budget.keep)
    # A cut may fall inside a character of several tokens, which decodes to a replacement mark.
    return budget.decode(kept).strip("\ufffd"), len(ids) - len(kept)
