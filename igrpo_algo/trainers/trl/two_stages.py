"""Both stages of a batch in TRL's hands: drafts drawn, one chosen for a group, prompts spliced."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...drafts.rules import DraftChoices, DraftRules
from ...rollouts.completions import Completion
from ...seeds import derive_seed
from ..draft_layout import DraftLayout
from .one_stage import StageTrainer
from .stages import Drafts, Refined, Round, Stage


class Pool(NamedTuple):
    """What was drawn of each prompt so far: n completions of each.

    Attributes:
        here: This rank's completions, by prompt and index among the prompt's own.
        lengths: Tokens of each completion of all ranks. Shape [P, n].
        rewards: The training reward of each, NaN where it has none. Shape [P, n].
        scores: What ranks them: the rewards, if nothing else does. Shape [P, n].
    """

    here: dict[tuple[int, int], Completion]
    lengths: Tensor
    rewards: Tensor
    scores: Tensor

    def joined(self, later: "Pool") -> "Pool":
        """Put the completions of a later stage after those of the earlier ones."""
        count = self.rewards.shape[1]
        moved = {(prompt, count + index): each for (prompt, index), each in later.here.items()}
        tables = zip(self[1:], later[1:], strict=True)
        return Pool(self.here | moved, *(torch.cat(pair, dim=1) for pair in tables))


class TwoStageTrainer(StageTrainer):
    """Draws Stage 1 with TRL, chooses by `rules`, and gets Stage 2 ready."""

    rules: DraftRules

    def draw_rounds(self, inputs: list[dict[str, Any]], layout: DraftLayout) -> Iterator[Round]:
        """Draw the drafts; then get each round ready, once the one before it has been run.

        Each round chooses among all completions so far, on all ranks alike, and splices the choice
        into the original prompt.
        """
        rows = [inputs[row] for row in layout.draft_rows]
        stage, batch = Stage(layout.num_drafts), None
        with self.drafting():
            if self.trains_drafts:
                batch = self.run_stage(rows, stage)
            else:
                self.draw_and_score(rows, stage)
        pool = self._pool(rows, stage, layout.drafts)
        drafts = Drafts(pool.rewards, batch)
        for number in range(1, self.rounds + 1):
            choices = self._rules().choose(
                pool.rewards,
                scores=pool.scores,
                lengths=pool.lengths,
                seeds=[self._seed(prompt, number) for prompt in range(len(pool.rewards))],
            )
            refined = self._splice_all(inputs, layout, choices, pool)
            stage = Stage.of_refined(layout.num_refinements, refined)
            yield Round(drafts, choices, refined, stage)
            if number < self.rounds:
                later = self._pool(inputs, stage, layout.refinements)
                unskipped = later.rewards.masked_fill(choices.skipped[:, None], torch.nan)
                pool = pool.joined(later._replace(rewards=unskipped))

    @property
    def rounds(self) -> int:
        """Rounds of refinement of this batch: evaluation refines once."""
        return self.args.refinement_rounds if self.model.training else 1

    def _pool(self, rows: list[dict[str, Any]], stage: Stage, numbers: range) -> Pool:
        """Look at a stage that TRL has drawn; `numbers` counts this rank's completions."""
        lengths = torch.tensor(list(map(len, stage.completion_ids)), device=self.accelerator.device)
        drawn = zip(numbers, stage.completion_ids, self.texts(stage), strict=True)
        rewards, scores = self.total_rewards(stage), self.selection_scores(rows, stage)
        return Pool(
            {divmod(number, stage.group): Completion(ids, text) for number, ids, text in drawn},
            self.accelerator.gather(lengths).view(-1, stage.group),
            rewards,
            rewards if scores is None else scores,
        )

    def _splice_all(
        self,
        inputs: list[dict[str, Any]],
        layout: DraftLayout,
        choices: DraftChoices,
        pool: Pool,
    ) -> list[Refined]:
        """Return the Stage-2 prompt of each row on this rank."""
        table = enumerate(zip(choices.index.tolist(), choices.plain.tolist(), strict=True))
        wanted = {(prompt, index) for prompt, (index, plain) in table if not plain}
        mine = [(key[0], pool.here[key]) for key in wanted & pool.here.keys()]
        # All that has to travel: each chosen draft, to the ranks that hold its prompt.
        chosen: dict[int, Completion] = dict(gather_object(mine))
        rows = dict(zip(layout.row_prompts, inputs, strict=True))
        refined = {
            prompt: self._splice(row["prompt"], chosen.get(prompt)) for prompt, row in rows.items()
        }
        return [refined[prompt] for prompt in layout.row_prompts]

    @property
    def trains_drafts(self) -> bool:
        """Whether the drafts of this batch get a loss of their own."""
        return self.model.training and self.args.draft_loss_coef > 0

    def _rules(self) -> DraftRules:
        """Return the rules of this batch: dropout is for training."""
        return self.rules if self.model.training else replace(self.rules, dropout=0.0)

    def _seed(self, *path: int) -> int:
        """Return a seed of this batch: the same on all ranks, and after a resume."""
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
