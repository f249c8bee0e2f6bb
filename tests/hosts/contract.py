"""What every adapter has to hold, whatever its trainer: its test says what it saw, this checks it.

Group("1+1?", drafts, best, sampled, trained, rewards, advantages).check()
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Group:
    """One group, as its trainer saw it.

    Attributes:
        question: The text of the user's message.
        drafts: The texts of the drafts that were drawn for it, in any order.
        best: The text of the draft that the rules choose.
        sampled: The prompts that the refinements were drawn from, as text.
        trained: The prompts of the rows that the loss sees, as text.
        rewards: Of the refinements; empty where the trainer has not scored them yet.
        advantages: Of the same rows.
    """

    question: str
    drafts: Sequence[str]
    best: str
    sampled: Sequence[str]
    trained: Sequence[str]
    rewards: Sequence[float] = ()
    advantages: Sequence[float] = ()

    def check(self, num_drafts: int, num_refinements: int) -> None:
        """Check the group; the template around a draft is "[" and "]" right after the question."""
        assert len(self.drafts) == num_drafts, "Stage 1 runs once for a group"
        assert len(self.trained) == num_refinements, "the loss sees the refinements alone"
        assert len(set(self.trained)) == 1, "a group has one Stage-2 prompt"
        prompt = self.trained[0]
        assert f"{self.question}[" in prompt, "the question stands there whole, the draft behind it"
        assert f"[{self.best}]" in prompt, "the draft is the one that the rules choose"
        assert set(self.trained) == set(self.sampled), "trained on what was sampled from"
        if self.rewards:
            check_advantages(self.rewards, self.advantages)


def check_advantages(rewards: Sequence[float], advantages: Sequence[float]) -> None:
    """Check that advantages are the refinements' among themselves, over either std or none."""
    mean = sum(rewards) / len(rewards)
    centered = [reward - mean for reward in rewards]
    if advantages == pytest.approx(centered, rel=1e-6, abs=1e-6):
        return
    for ddof in (0, 1):
        std = (sum(c * c for c in centered) / (len(rewards) - ddof)) ** 0.5
        # Trainers add 1e-9 to 1e-4 to the standard deviation.
        if advantages == pytest.approx([c / std for c in centered], rel=0, abs=1e-4 / std + 1e-5):
            return
    raise AssertionError(f"advantages {advantages} are not those of rewards {rewards}")
