"""Both stages of a batch in TRL's hands: drafts drawn, one chosen for a group, prompts spliced."""

from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object

from ...drafts.rules import DraftRules
from ...rollouts.completions import Completion
from ...seeds import derive_seed
from ..draft_layout import DraftLayout
from .one_stage import StageTrainer
from .stages import Drafts, Refined, Stage, TwoStages


class TwoStageTrainer(StageTrainer):
    """Draws Stage 1 with TRL, chooses by `rules`, and gets Stage 2 ready."""

    rules: DraftRules

    def draw_two_stages(self, inputs: list[dict[str, Any]], layout: DraftLayout) -> TwoStages:
        """Draw the drafts, choose on all ranks alike, and splice; Stage 2 is left to be run."""
        drafts = self._draw_drafts(inputs, layout)
        choices = self._rules().choose(
            drafts.rewards,
            scores=drafts.scores,
            lengths=drafts.lengths,
            seeds=[self._seed(prompt) for prompt in range(len(drafts.rewards))],
        )
        mine = [
            (prompt, drafts.completions[place].token_ids, drafts.completions[place].text)
            for prompt, place in layout.chosen_here(choices).items()
        ]
        # All that has to travel: each chosen draft, to the ranks that hold its prompt.
        chosen = {prompt: Completion(ids, text) for prompt, ids, text in gather_object(mine)}
        refined: dict[int, Refined] = {}
        for row, prompt in zip(inputs, layout.row_prompts, strict=True):
            if prompt not in refined:
                refined[prompt] = self._splice(row["prompt"], chosen.get(prompt))
        rows = [refined[prompt] for prompt in layout.row_prompts]
        return TwoStages(drafts, choices, rows, Stage.of_refined(layout.num_refinements, rows))

    def _draw_drafts(self, inputs: list[dict[str, Any]], layout: DraftLayout) -> Drafts:
        rows, batch = [inputs[row] for row in layout.draft_rows], None
        stage = Stage(layout.num_drafts)
        with self.drafting():
            if self.trains_drafts:
                batch = self.run_stage(rows, stage)
            else:
                self.draw_and_score(rows, stage)
        scores = self.selection_scores(rows, stage)
        lengths = torch.tensor(list(map(len, stage.completion_ids)), device=self.accelerator.device)
        drawn = zip(stage.completion_ids, self.texts(stage), strict=True)
        return Drafts(
            [Completion(ids, text) for ids, text in drawn],
            self.accelerator.gather(lengths).view(-1, stage.group),
            self.total_rewards(stage),
            scores,
            batch,
        )

    @property
    def trains_drafts(self) -> bool:
        """Whether the drafts of this batch get a loss of their own."""
        return self.model.training and self.args.draft_loss_coef > 0

    def _rules(self) -> DraftRules:
        """Give the rules of this batch: dropout is for training."""
        return self.rules if self.model.training else replace(self.rules, dropout=0.0)

    def _seed(self, *path: int) -> int:
        """Give a seed of this batch: the same on all ranks, and after a resume."""
        micro_step = self._step % self.args.gradient_accumulation_steps
        return derive_seed(self.args.seed, self.state.global_step, micro_step, *path)

    def _splice(self, prompt: Any, draft: Completion | None) -> Refined:
        if draft is None:
            return Refined(prompt)
        spliced = self.rules.condition(prompt, draft)
        return self.refined(spliced.prompt, spliced.draft, spliced.tokens_cut)

    def refined(self, prompt: Any, draft: str, tokens_cut: int) -> Refined:
        """Count the tokens of the draft as it stands in the prompt."""
        length = len(self._tokenizer(draft, add_special_tokens=False)["input_ids"])
        return Refined(prompt, draft, length, tokens_cut)
