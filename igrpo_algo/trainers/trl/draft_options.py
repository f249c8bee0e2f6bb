"""The options about drafts as a value: `DraftRules`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from igrpo_kernels.checks import describe

from ...drafts.markers import marker_tokens
from ...drafts.random_tokens import RandomTokens
from ...drafts.rules import DraftRules, Fallback, Ties
from ...drafts.select import (
    select_best_draft,
    select_best_wrong_draft,
    select_random_draft,
    select_worst_draft,
)
from ...drafts.splice import TextSplice, TokenBudget
from ...drafts.text import DEFAULT_TEMPLATE, DraftTemplate
from ...thinking import strip_thinking

WHEN_ALIKE = {
    "condition": Fallback.CHOSEN_DRAFT,
    "plain_prompt": Fallback.PLAIN_PROMPT,
    "skip": Fallback.SKIP,
}

if TYPE_CHECKING:
    from .config import IGRPOConfig

CHOICES: dict[str, dict[str, Any]] = {
    "draft_choice": {
        "best": select_best_draft,
        "random": select_random_draft,
        "worst": select_worst_draft,
        "best_wrong": select_best_wrong_draft,
        "random_tokens": select_best_draft,
        "none": select_best_draft,
    },
    "draft_ties": {
        "lowest_index": Ties.FIRST,
        "random": Ties.RANDOM,
        "shortest": Ties.SHORTEST,
    },
    "all_drafts_failed": WHEN_ALIKE,
    "all_drafts_right": WHEN_ALIKE,
    "draft_keep": {"tail": "tail", "head": "head"},
}

OF_SPLICE = (
    "strip_draft_thinking",
    "max_draft_length",
    "max_spliced_prompt_length",
    "draft_keep",
    "draft_template",
)
OF_RULES = (
    "draft_choice",
    "draft_ties",
    "all_drafts_failed",
    "all_drafts_right",
    *OF_SPLICE,
    "draft_dropout",
)
"""Options that `rules_of` reads: beside rules of the caller's own they would have no effect."""

OF_DRAFTS = (
    *OF_RULES,
    "refinement_rounds",
    "success_reward",
    "selection_reward",
    "reward_max",
    "draft_loss_coef",
    "eval_with_draft",
)
"""Options that have no effect without drafts."""


def rules_of(
    args: "IGRPOConfig", tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None = None
) -> DraftRules:
    """Turn the options about drafts into the rules that rollouts take.

    Args:
        args: The configuration.
        tokenizer: Names the control tokens that no draft may hold, and counts lengths.
        chat_template_kwargs: What the chat template is given besides the prompt.

    Returns:
        The rules; for `draft_choice="none"` with a dropout of 1.
    """
    budget = None
    if args.max_draft_length is not None or args.max_spliced_prompt_length is not None:
        budget = TokenBudget(
            tokenizer,
            args.max_draft_length,
            args.max_spliced_prompt_length,
            CHOICES["draft_keep"][args.draft_keep],
            chat_template_kwargs or {},
        )
    strip: Callable[[str], str] | None = strip_thinking if args.strip_draft_thinking else None
    if args.draft_choice == "random_tokens":
        strip = RandomTokens(tokenizer, strip)
    select = CHOICES["draft_choice"][args.draft_choice]
    if args.draft_choice == "best_wrong" and args.success_reward != 1.0:
        select = partial(select, success_reward=args.success_reward)
    template = template_of(args.draft_template)
    # Every scored draft ties with every other where one is chosen at random.
    ties = "random" if args.draft_choice == "random" else args.draft_ties
    return DraftRules(
        select=select,
        ties=CHOICES["draft_ties"][ties],
        failed_below=args.success_reward,
        when_failed=CHOICES["all_drafts_failed"][args.all_drafts_failed],
        when_solved=CHOICES["all_drafts_right"][args.all_drafts_right],
        dropout=1.0 if args.draft_choice == "none" else args.draft_dropout,
        splice=TextSplice(template, strip, marker_tokens(tokenizer), budget),
    )


def template_of(parts: Any) -> DraftTemplate:
    """Turn the fields of a template, or None for the default, into the template.

    Raises:
        TypeError: `parts` is neither, or the fields are not those of a template.
    """
    if parts is None:
        return DEFAULT_TEMPLATE
    if not isinstance(parts, Mapping):
        raise TypeError(f"draft_template must be a dict, got {describe(parts)}")
    return DraftTemplate(**{**parts, "delimiters": tuple(parts.get("delimiters", ()))})
