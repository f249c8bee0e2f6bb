"""Warnings that learning has stopped because of iGRPO, each with the number and a remedy.

All were seen in pilots. Training only on refinements of the best draft ends in copying: every
group of refinements becomes equal, and learning stops. Training only on refinements, a model can
forget the plain question. A template that it does not understand makes refinements worse than
drafts from the first batch on.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from statistics import fmean
from typing import NamedTuple

from igrpo_kernels.checks import check_count, describe

WINDOW = 10
COPIES_TAKE_OVER = 0.5
NEARLY_ALL = 0.9
NEARLY_NONE = 0.1
TEMPLATE_BREAKS = 0.5  # of the drafts' reward is lost; a worst draft alone costs up to 0.4
FORGOTTEN = 1 / 3  # of the drafts' reward in the first batches is lost
ERRORS = 3
STAGES = ("refinement", "draft")


@dataclass
class EarlyWarning:
    """Watches the metrics of a two-stage run batch by batch, and gives each warning once.

    A gap counts if it is more than three standard errors of its mean over the window's batches.

    Attributes:
        window: Batches that a mean is taken over; before it is full, only copies are warned of.

    Examples:
        >>> watch = EarlyWarning(window=2)
        >>> batch = {"refinement_zero_std": 1.0, "draft_zero_std": 0.25}
        >>> [len(watch.see(batch)) for _ in range(3)]
        [0, 1, 0]
    """

    window: int = WINDOW
    _seen: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        check_count("window", self.window)

    def see(self, metrics: Mapping[str, float]) -> list[str]:
        """Take the metrics of a batch; what is missing or not finite is left out.

        Args:
            metrics: Of `copied`, `refinement_zero_std`, `draft_zero_std`, `draft_reward`, `uplift`,
                `right_after_right_draft` and `right_after_wrong_draft` those that are known. NaN
                for `copied` means that no draft was shown; the uplift is then left out.

        Returns:
            The warnings that were not given before.
        """
        if not isinstance(metrics, Mapping):
            raise TypeError(f"metrics must be a mapping, got {describe(metrics)}")
        for name, value in metrics.items():
            if not isinstance(value, Real):
                raise TypeError(f"metrics[{name!r}] must be a number, got {describe(value)}")
        equal, of_drafts = (metrics.get(f"{of}_zero_std", math.nan) for of in STAGES)
        known = {**metrics, "equal_gap": equal - of_drafts}
        if math.isnan(metrics.get("copied", 0.0)):
            known.pop("uplift", None)
        for name, value in known.items():
            if math.isfinite(value):
                self._seen[name].append(value)
        found = {
            "copies": self._copies(metrics.get("copied", math.nan)),
            "equal groups": self._equal_groups(),
            "verdicts": self._verdicts(),
            "forgotten": self._forgotten(),
            "template": self._template(),
        }
        new = {name: text for name, text in found.items() if text and name not in self._said}
        self._said |= new.keys()
        return list(new.values())

    def _mean(self, name: str) -> float:
        """Average the last batches; NaN before there are enough."""
        return self._last(name).value

    def _last(self, name: str) -> "Mean":
        last = self._seen[name][-self.window :]
        return mean(last) if len(last) == self.window else Mean(math.nan, math.nan)

    def _copies(self, copied: float) -> str | None:
        if not copied > COPIES_TAKE_OVER:
            return None
        return (
            f"{copied:.0%} of the refinements repeat their draft: copying is rewarded, and Stage 2 "
            "learns little else. See draft_loss_coef, draft_dropout and draft_choice."
        )

    def _equal_groups(self) -> str | None:
        equal, gap = self._mean("refinement_zero_std"), self._last("equal_gap")
        if not (equal >= NEARLY_ALL and gap.value > max(NEARLY_NONE, ERRORS * gap.error)):
            return None
        of_drafts = self._mean("draft_zero_std")
        return (
            f"{equal:.0%} of the groups of refinements had equal rewards in the last {self.window} "
            f"batches, but {of_drafts:.0%} of the groups of drafts: Stage 2 has no gradient "
            "left, the drafts do. Train them too (draft_loss_coef=1), or see draft_choice."
        )

    def _verdicts(self) -> str | None:
        after_right = self._mean("right_after_right_draft")
        after_wrong = self._mean("right_after_wrong_draft")
        if not (after_right >= 1 - NEARLY_NONE**2 and after_wrong <= NEARLY_NONE**2):
            return None
        return (
            f"refinements were right in {after_right:.0%} after a right draft and in "
            f"{after_wrong:.0%} after a wrong one in the last {self.window} batches: the draft "
            "decides the result, and Stage 2 learns to repeat it. See draft_loss_coef, "
            "draft_dropout and draft_choice."
        )

    def _forgotten(self) -> str | None:
        seen = self._seen["draft_reward"]
        if len(seen) < 2 * self.window:
            return None
        (start, start_error), (now, now_error) = (
            mean(seen[: self.window]),
            self._last("draft_reward"),
        )
        error = math.hypot(start_error, now_error)
        if not start - now > max(FORGOTTEN * abs(start), ERRORS * error):
            return None
        return (
            f"drafts scored {now:.2g} in the last {self.window} batches and {start:.2g} (+- "
            f"{error:.1g}) in the first: learning to refine, the model forgets the plain question. "
            "Train the drafts too (draft_loss_coef=1), or see draft_dropout."
        )

    def _template(self) -> str | None:
        if len(self._seen["uplift"]) != self.window:
            return None
        uplift, error = self._last("uplift")
        loss, level = -uplift, self._mean("draft_reward")
        if not loss > max(TEMPLATE_BREAKS * abs(level), ERRORS * error):
            return None
        return (
            f"refinements scored {loss:.2g} (+- {error:.1g}) below the drafts' {level:.2g} in the "
            f"first {self.window} batches: the model does not understand its prompt. See "
            "draft_template, max_draft_length and strip_draft_thinking."
        )


class Mean(NamedTuple):
    """A mean over some batches, and its standard error (ddof 1)."""

    value: float
    error: float


def mean(values: Sequence[float]) -> Mean:
    """Average finite values; the error of a single one is taken as 0."""
    center = fmean(values)
    variance = sum((value - center) ** 2 for value in values) / max(len(values) - 1, 1)
    return Mean(center, math.sqrt(variance / len(values)))
