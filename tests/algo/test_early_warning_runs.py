"""The early warning on whole runs: one that collapses into copies, and two that learn.

The policy is a table: for each question the log-odds of its answers, and, for all of them alike,
the log-odds that a refinement repeats its draft. It is trained as the paper trains, in a second.
"""

import re

import pytest
import torch

from igrpo_algo import (
    DraftRules,
    Rollouts,
    select_worst_draft,
    standardize_by_group,
    two_stage_rollout,
)
from igrpo_algo.drafts.rules import DraftChoices
from igrpo_algo.drafts.splice import Spliced
from igrpo_algo.early_warning import EarlyWarning
from igrpo_algo.metrics import copy_rate
from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.trainers.trl.metrics import stage_metrics

QUESTIONS, ANSWERS, STEPS, LEARNED, RIGHT = 12, 5, 60, 0.75, "0"


class Table(torch.nn.Module):
    """p(answer | question, draft) = copies [answer = draft] + (1 - copies) p(answer | question)."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = torch.nn.Parameter(torch.zeros(QUESTIONS, ANSWERS))
        self.copies = torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, prompt: str) -> torch.Tensor:
        question, *draft = map(int, prompt.split())
        probs = self.answers[question].softmax(-1)
        if not draft:
            return probs
        copies = self.copies.sigmoid()
        copy = torch.nn.functional.one_hot(torch.tensor(draft[0]), ANSWERS)
        return copies * copy + (1 - copies) * probs

    @torch.no_grad()
    def sample(self, prompts, n, seed):
        groups = []
        for prompt, own in zip(prompts, seed, strict=True):
            rng = torch.Generator().manual_seed(own % 2**63)
            drawn = torch.multinomial(self(prompt), n, replacement=True, generator=rng)
            groups.append([Completion([token], str(token)) for token in drawn.tolist()])
        return groups

    def skill(self) -> float:
        """Single-shot accuracy."""
        return self.answers.softmax(-1)[:, int(RIGHT)].mean().item()


def metrics_of(rollouts: Rollouts) -> dict[str, float]:
    """What the trainer logs of a batch."""
    shown = rollouts.conditioned
    rewards = torch.tensor([each.choices[-1].reward for each in rollouts])
    choices = DraftChoices(
        rollouts.chosen, rewards, rollouts.failed, rollouts.dropped, rollouts.skipped, ~shown
    )
    rows, group = rollouts.refinement_rewards.numel(), rollouts.refinement_rewards.shape[1]
    copied = copy_rate([each.choices[-1].draft for each in rollouts], rollouts.refinements.texts)
    in_rows = int(shown.sum()) * group
    counts = [rows, in_rows, in_rows and copied * in_rows, in_rows, 0]
    return stage_metrics(
        rollouts.draft_rewards, rollouts.refinement_rewards, choices, counts, threshold=1.0
    )


def reward(prompts, completions) -> list[float]:
    return [float(text == RIGHT) for text in completions]


def run(rules: DraftRules, *, train_drafts: bool) -> tuple[dict[int, list[str]], float]:
    """Train a fresh table until it has learned; give the warnings by step, and its skill."""
    table, watch, said = Table(), EarlyWarning(), {}
    optimizer = torch.optim.SGD(table.parameters(), lr=0.2)
    questions = [str(question) for question in range(QUESTIONS)]
    for step in range(STEPS):
        rollouts = two_stage_rollout(questions, table.sample, reward, rules=rules, seed=step)
        if texts := watch.see(metrics_of(rollouts)):
            said[step] = texts
        optimizer.zero_grad()
        for rollout in rollouts:
            for stage in rollout.stages if train_drafts else rollout.refinements:
                advantages = standardize_by_group(torch.tensor([stage.rewards]))[0]
                tokens = [completion.token_ids[0] for completion in stage.completions]
                (-(advantages * table(stage.prompt)[tokens].log()).mean()).backward()
        optimizer.step()
        if table.skill() > LEARNED:
            break
    return said, table.skill()


def show(question: str, draft: Completion) -> Spliced:
    return Spliced(f"{question} {draft.text}", draft.text, 0)


def hide(question: str, draft: Completion) -> Spliced:
    return Spliced(question, "", 0)


def test_the_papers_form_collapses_into_copies_and_is_warned_of() -> None:
    said, skill = run(DraftRules(splice=show), train_drafts=False)
    copies, equal, verdicts = [(step, text) for step, texts in said.items() for text in texts]
    assert re.match(r"[56]\d% of the refinements repeat .* draft_dropout", copies[1])
    assert re.match(r"9\d% of the groups of refinements .*draft_loss_coef=1", equal[1])
    assert re.match(r".* 99% after a right draft and in [01]% .*draft_choice", verdicts[1])
    assert copies[0] < equal[0] < verdicts[0]
    assert skill < 0.3  # a fifth is chance


@pytest.mark.parametrize("splice", [show, hide])
def test_both_stages_with_the_worst_draft_learn_and_are_left_alone(splice) -> None:
    said, skill = run(DraftRules(select_worst_draft, splice=splice), train_drafts=True)
    assert said == {}
    assert skill > LEARNED
