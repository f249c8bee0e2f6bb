"""The arms: each is a few options of `IGRPOConfig`, and nothing else decides what a run does but
whether refinements are trained under the question too, which that trainer does not do.

Every arm spends eight completions per prompt, but "grpo-half", which spends four. What is not named
here is the paper's: 4 drafts, 4 refinements, the best draft, the refinements trained alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.replication.models import PRETRAINED, SHIPPED
from benchmarks.replication.tasks import ALL_TASKS

GRPO = {"num_drafts": 0, "num_refinements": 8}
TWICE = {"num_iterations": 2}  # two updates per batch: surrogates differ where ratios are not 1
KEPT = {"strip_draft_thinking": False}
DAPO = {"loss_type": "dapo", "epsilon_high": 0.28}
GSPO = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}


@dataclass(frozen=True)
class Arm:
    """One way of spending a prompt's completions.

    Attributes:
        label: What the page calls it.
        options: Of `IGRPOConfig`.
        question_coef: Weight of a second loss, of drafts and refinements as one group under the
            question.
    """

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    question_coef: float = 0.0

    @property
    def num_drafts(self) -> int:
        return self.options.get("num_drafts", 4)

    @property
    def num_refinements(self) -> int:
        return self.options.get("num_refinements", 4)

    @property
    def completions(self) -> int:
        """Completions of a prompt, in all stages."""
        rounds = self.options.get("refinement_rounds", 1)
        return self.num_drafts + rounds * self.num_refinements


def _both(choice: str, drafts: int = 4, refinements: int = 4) -> dict[str, Any]:
    """Both stages trained; each completion weighs the same, drafts and refinements alike."""
    return {
        "draft_choice": choice,
        "num_drafts": drafts,
        "num_refinements": refinements,
        "draft_loss_coef": drafts / refinements,
    }


def _under_question(label: str, drafts: int, refinements: int) -> Arm:
    """All completions trained under the question, refinements under their own prompt too."""
    options = {"draft_choice": "worst", "num_drafts": drafts, "num_refinements": refinements}
    return Arm(label, options, question_coef=(drafts + refinements) / refinements)


MAIN = {
    "grpo": Arm("GRPO, 8", GRPO),
    "grpo-half": Arm("GRPO, 4: half the completions", GRPO | {"num_refinements": 4}),
    "best": Arm("best draft (the paper)"),
    "worst": Arm("worst draft", {"draft_choice": "worst"}),
    "random": Arm("random draft", {"draft_choice": "random"}),
    "none": Arm("no draft shown", {"draft_choice": "none"}),
    "both-best": Arm("both stages, best draft", _both("best")),
    "both-worst": Arm("both stages, worst draft", _both("worst")),
    "both-best-wrong": Arm("both stages, best wrong draft", _both("best_wrong")),
    "both-worst-6-2": Arm("both stages, worst draft, 6 : 2", _both("worst", 6, 2)),
    "question-worst": _under_question("all under the question too, worst draft", 4, 4),
    "question-worst-6-2": _under_question("all under the question too, worst draft, 6 : 2", 6, 2),
    "random-tokens": Arm("random tokens for a draft", {"draft_choice": "random_tokens"}),
}
"""What is run first."""

MORE = {
    "best-wrong": Arm("best wrong draft", {"draft_choice": "best_wrong"}),
    "both-random": Arm("both stages, random draft", _both("random")),
    "dropout": Arm("best draft, dropped half of the time", {"draft_dropout": 0.5}),
    "both-worst-dropout": Arm(
        "both stages, worst draft, dropped half of the time",
        _both("worst") | {"draft_dropout": 0.5},
    ),
    "not-solved": Arm("best draft, none where all are right", {"all_drafts_right": "plain_prompt"}),
    "mixed": Arm(
        "best draft, only where drafts differ",
        {"all_drafts_right": "plain_prompt", "all_drafts_failed": "plain_prompt"},
    ),
    "best-2-6": Arm("best draft, 2 : 6", {"num_drafts": 2, "num_refinements": 6}),
    "best-6-2": Arm("best draft, 6 : 2", {"num_drafts": 6, "num_refinements": 2}),
    "both-worst-2-6": Arm("both stages, worst draft, 2 : 6", _both("worst", 2, 6)),
    "both-best-6-2": Arm("both stages, best draft, 6 : 2", _both("best", 6, 2)),
    "two-rounds": Arm(
        "best draft so far, two rounds", {"num_refinements": 2, "refinement_rounds": 2}
    ),
    "grpo-twice": Arm("GRPO, two updates", GRPO | TWICE),
    "dapo": Arm("DAPO, two updates", GRPO | TWICE | DAPO),
    "gspo": Arm("GSPO, two updates", GRPO | TWICE | GSPO),
    "best-twice": Arm("best draft, two updates", TWICE),
    "best-dapo": Arm("best draft, DAPO, two updates", TWICE | DAPO),
    "best-gspo": Arm("best draft, GSPO, two updates", TWICE | GSPO),
    "both-worst-twice": Arm("both stages, worst draft, two updates", _both("worst") | TWICE),
    "both-worst-dapo": Arm(
        "both stages, worst draft, DAPO, two updates", _both("worst") | TWICE | DAPO
    ),
    "both-worst-gspo": Arm(
        "both stages, worst draft, GSPO, two updates", _both("worst") | TWICE | GSPO
    ),
}

THINKING = {
    "thinking-kept": Arm("best draft, its thinking shown", KEPT),
    "both-worst-thinking-kept": Arm(
        "both stages, worst draft, its thinking shown", _both("worst") | KEPT
    ),
}
"""Only for tasks that think: on others they would be what `STRIPPED` names once more."""
STRIPPED = {"thinking-kept": "best", "both-worst-thinking-kept": "both-worst"}
"""The arms that differ from those in the draft's thinking alone, which they don't show."""

ARMS = MAIN | MORE | THINKING
LADDER = {
    name: ARMS[name]
    for name in (
        *("grpo", "grpo-half", "best", "worst", "random", "both-best", "both-worst"),
        *("both-best-wrong", "both-worst-6-2", "both-worst-dropout", "question-worst-6-2"),
        *("grpo-twice", "best-twice", "both-worst-twice"),
    )
}
"""What is run on larger models. "none" is left out, since "grpo-half" is the same run."""
SEEDS = 5


def planned(task: str, size: str) -> Mapping[str, Arm]:
    """Give the arms that are run by default, and that the page counts as planned.

    All that a task can tell apart, on the smallest models; what comes after `MAIN` is left out on
    a task that thinks. `LADDER` on larger ones, `MAIN` on a pretrained one: each run costs more.
    """
    if size == PRETRAINED:
        return MAIN
    if size != SHIPPED:
        return LADDER
    return MAIN | THINKING if ALL_TASKS[task].thinks else MAIN | MORE


BASELINES = {"twice": "grpo-twice", "dapo": "dapo", "gspo": "gspo"}
"""By how an arm's name ends: the arm that it is compared with. All others: "grpo"."""


def baseline_of(name: str) -> str:
    """Name the GRPO arm of the same loss and number of updates.

    Examples:
        >>> baseline_of("both-worst-dapo"), baseline_of("both-worst")
        ('dapo', 'grpo')
    """
    return BASELINES.get(name.rpartition("-")[2], "grpo")
