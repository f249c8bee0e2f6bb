"""Random tokens in place of a draft: what Stage 2 does when the draft carries no information."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from igrpo_kernels.checks import check_callable

from ..fields import check_fields
from ..thinking import check_text, strip_thinking


@dataclass(frozen=True)
class RandomTokens:
    """Replaces a draft, as it would be shown, by as many random tokens: a control for its content.

    The tokens are uniform over the vocabulary without its special tokens; as text in a prompt, a
    tokenizer may read some of them otherwise. The same draft gives the same ones, on every rank.
    Give it to `TextSplice` in place of `strip_thinking`.

    Attributes:
        tokenizer: Hugging Face's interface: called on text, `decode`, `get_vocab`,
            `all_special_ids`.
        strip: What is kept of the draft, and counted; as in `TextSplice`.

    Examples:
        >>> class Letters:
        ...     all_special_ids = [0]
        ...     def get_vocab(self):
        ...         return {"": 0, "a": 1, "b": 2}
        ...     def __call__(self, text, add_special_tokens=True):
        ...         return {"input_ids": [1] * len(text)}
        ...     def decode(self, ids):
        ...         return "".join("ab"[i - 1] for i in ids)
        >>> RandomTokens(Letters())("fourteen")
        'abbaaaab'
    """

    tokenizer: Any
    strip: Callable[[str], str] | None = strip_thinking

    def __post_init__(self) -> None:
        check_fields(self)
        check_callable("tokenizer", self.tokenizer)

    def __call__(self, draft: str) -> str:
        """Return the text of the random tokens; empty where nothing is kept of the draft."""
        check_text("draft", draft)
        draft = draft if self.strip is None else self.strip(draft)
        special = set(self.tokenizer.all_special_ids)
        ids = sorted(set(self.tokenizer.get_vocab().values()) - special)
        count = len(self.tokenizer(draft, add_special_tokens=False)["input_ids"])
        return str(self.tokenizer.decode(random.Random(draft).choices(ids, k=count)))
