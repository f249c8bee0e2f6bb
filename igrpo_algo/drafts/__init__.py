"""Drafts: which one is chosen, and how it gets into the prompt.

`rules` is where both come together. `select` chooses by reward; `splice` puts text into strings and
chat messages (`text`), or ids into lists of ids, within limits of length (`budget`); `markers`
keeps a draft from writing turns of its own.
"""

from .budget import fit_draft, truncate_draft
from .markers import neutralize
from .random_tokens import RandomTokens
from .rules import DraftChoice, DraftChoices, DraftRules, Fallback, Ties
from .select import (
    SelectedDrafts,
    random_ties,
    select_best_draft,
    select_best_wrong_draft,
    select_random_draft,
    select_worst_draft,
    shortest_first,
)
from .splice import Spliced, TextSplice, TokenBudget, TokenSplice
from .text import (
    CONCATENATION,
    DEFAULT_TEMPLATE,
    PAPER_TEMPLATE,
    DraftTemplate,
    splice_prompt,
)

__all__ = [
    "CONCATENATION",
    "DEFAULT_TEMPLATE",
    "PAPER_TEMPLATE",
    "DraftChoice",
    "DraftChoices",
    "DraftRules",
    "DraftTemplate",
    "Fallback",
    "RandomTokens",
    "SelectedDrafts",
    "Spliced",
    "TextSplice",
    "Ties",
    "TokenBudget",
    "TokenSplice",
    "fit_draft",
    "neutralize",
    "random_ties",
    "select_best_draft",
    "select_best_wrong_draft",
    "select_random_draft",
    "select_worst_draft",
    "shortest_first",
    "splice_prompt",
    "truncate_draft",
]
