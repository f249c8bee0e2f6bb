"""The text of the Stage-2 prompt: the question, the best draft, and what to do with it.

q' = Concat(q, d*)   (iGRPO, Hatamizadeh et al. 2026, arXiv:2602.09000, equation 3)

The paper leaves open which words stand around the draft and in whose turn it stands. Here the words
are a `DraftTemplate`, and the draft goes into the last user message: chat templates strip the
thinking of earlier assistant turns, and several refuse two user turns in a row.

A draft is text from a model, so it is never read as a template (the parts are joined by `+`), and
`neutralize` (in `markers`) keeps it from ending its own place in the prompt. Nothing here needs
torch.
"""

from collections.abc import Collection
from dataclasses import dataclass
from reprlib import repr as shown  # short, of anything
from typing import Any, TypeVar

from ..thinking import check_text
from .markers import check_markers, neutralize

Question = TypeVar("Question", str, list[dict[str, Any]])


@dataclass(frozen=True)
class DraftTemplate:
    r"""The words between the question and the draft, and those after the draft.

    q' = q + before + draft + after

    Plain text: nothing in it, nor in what it surrounds, is a placeholder.

    Attributes:
        before: Text between the question and the draft.
        after: Text after the draft.
        delimiters: Strings of `before` and `after` that mark where the draft begins and ends;
            `splice_prompt` takes them out of the draft.

    Raises:
        TypeError: A part is not a string, or `delimiters` is not a tuple of strings.
        ValueError: A delimiter is empty, or occurs in neither part and would have no effect.

    Examples:
        >>> template = DraftTemplate("\n\nEarlier attempt: [", "]\nImprove it.", ("[", "]"))
        >>> splice_prompt("1 + 1?", "it is 3", template=template)
        '1 + 1?\n\nEarlier attempt: [it is 3]\nImprove it.'
    """

    before: str
    after: str
    delimiters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            check_text(name, getattr(self, name))
        if not isinstance(self.delimiters, tuple):
            raise TypeError(f"delimiters must be a tuple of str, got {shown(self.delimiters)}")
        for delimiter in check_markers("delimiters", self.delimiters):
            if delimiter not in self.before and delimiter not in self.after:
                raise ValueError(
                    f"delimiters must occur in before or after, got {delimiter!r} that does not"
                )


DEFAULT_TEMPLATE = DraftTemplate(before="\nEarlier attempt, which may be wrong: ", after="")
"""One line, which small models follow too: a long instruction like the paper's can wreck theirs."""

PAPER_TEMPLATE = DraftTemplate(
    before=(
        "\n\nHere is an earlier attempt at this problem. "
        "It is guidance, not the truth: it may be wrong.\n\n<earlier_attempt>\n"
    ),
    after=(
        "\n</earlier_attempt>\n\n"
        "Give a final answer that is strictly better than this attempt: fix its mistakes, fill its "
        "gaps, strengthen its justification and be clearer. Where it is wrong or incomplete, "
        "correct it and go on from there. Do not repeat it word for word."
    ),
    delimiters=("<earlier_attempt>", "</earlier_attempt>"),
)
"""A labeled draft with the instruction of the paper's appendix C, in our words."""

CONCATENATION = DraftTemplate(before="\n\n", after="")
"""The paper's equation 3 to the letter: the draft stands right after the question, an empty line
apart, and only the system prompt (`cli.data.PAPER_SYSTEM_PROMPT`) says what to do with it."""


def splice_prompt(
    prompt: Question,
    draft: str,
    *,
    template: DraftTemplate = DEFAULT_TEMPLATE,
    special_tokens: Collection[str] = (),
) -> Question:
    r"""Put a draft after the question: the Stage-2 prompt.

    q' = q + before + draft + after

    In a conversation the last user message takes the draft, whatever follows that message. Content
    that is a string grows; content that is a list of blocks gets one more text block, so images
    stay where they are. The draft passes through `neutralize` with `special_tokens` and the
    template's own delimiters. Splice into the original question each time: a spliced prompt that
    is spliced again holds both drafts. iGRPO: arXiv:2602.09000, equation 3.

    Args:
        prompt: The question: plain text to which no chat template has been applied, or a
            conversation of messages with "role" and "content". It is not changed; messages
            other than the last user's are shared with the result.
        draft: The chosen completion as text; may be empty. See `strip_thinking`.
        template: The words around the draft.
        special_tokens: Strings that the tokenizer reads as control tokens. See `marker_tokens`.

    Returns:
        The spliced prompt, of the type of `prompt`.

    Raises:
        TypeError: An argument, a message or its content has another type than described.
        ValueError: The conversation has no user message.

    Examples:
        >>> splice_prompt("What is 2 + 3?", "It is 6.", template=CONCATENATION)
        'What is 2 + 3?\n\nIt is 6.'
    """
    return splice_cleaned(prompt, draft, template=template, special_tokens=special_tokens)[0]


def splice_cleaned(
    prompt: Question, draft: str, *, template: DraftTemplate, special_tokens: Collection[str]
) -> tuple[Question, str]:
    """Splice as `splice_prompt` does; give the prompt, and the draft as it reads in its place."""
    check_text("draft", draft)
    if not isinstance(template, DraftTemplate):
        raise TypeError(f"template must be a DraftTemplate, got {shown(template)}")
    markers = {*check_markers("special_tokens", special_tokens), *template.delimiters}
    before, after = template.before, template.after

    def clean(question: str) -> str:
        return neutralize(draft, markers, before=question + before, after=after)

    if isinstance(prompt, str):
        cleaned = clean(prompt)
        return prompt + before + cleaned + after, cleaned
    last: int = _last_user_turn(prompt)
    message = prompt[last]
    content = message.get("content")
    cleaned = clean(_last_text(content))
    grown = {**message, "content": _append_text(content, before + cleaned + after)}
    return [*prompt[:last], grown, *prompt[last + 1 :]], cleaned


def _last_user_turn(messages: object) -> int:
    if not isinstance(messages, list):
        raise TypeError(
            f"prompt must be a str or a list of messages, got {type(messages).__name__}"
        )
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise TypeError(f"prompt[{index}] must be a message (a dict), got {shown(message)}")
    roles = [message.get("role") for message in messages]
    if "user" not in roles:
        raise ValueError(f"prompt must have a user message to take the draft, got roles {roles}")
    return len(roles) - 1 - roles[::-1].index("user")


def _last_text(content: Any) -> str:
    """Return the text that ends a message: a new block does not run into an image."""
    last = content[-1] if isinstance(content, list) and content else content
    text = last.get("text") if isinstance(last, dict) else last
    return text if isinstance(text, str) else ""


def _append_text(content: Any, text: str) -> str | list[Any]:
    if isinstance(content, str):
        return content + text
    if isinstance(content, list):
        return [*content, {"type": "text", "text": text}]
    raise TypeError(
        f"content of the last user message must be a str or a list of blocks, got {content!r}"
    )
