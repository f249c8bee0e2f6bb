"""Both stages of a batch drawn by a sampler of the library, as a stream, for all ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ...drafts.rules import DraftChoices, DraftRules
from ...prompts import encode_prompt
from ...rollouts.completions import Completion
from ...rollouts.records import Rollout
from ...rollouts.sampling import AnySampler
from ..draft_layout import DraftLayout
from .sampler import draw_rollouts, sync_sampler
from .stages import Drafts, Refined, Round, Sampled, Stage
from .streamed_rewards import Scored, StreamedRewards
from .two_stages import TwoStageTrainer


class ScoredRollout(NamedTuple):
    """A prompt's rollout, with what each reward function said.

    Attributes:
        prompt: Index of the prompt among those of all ranks.
        rollout: All that was drawn.
        said: Of each completion of each stage.
    """

    prompt: int
    rollout: Rollout
    said: list[list[Scored]]


class SampledTrainer(TwoStageTrainer):
    """Draws both stages with `sampler` where there is one; with TRL otherwise."""

    sampler: AnySampler | None = None
    _synced_step = -1

    def draw_one_stage(self, inputs: list[dict[str, Any]], stage: Stage) -> Stage:
        """Get the only stage of a batch ready: what the sampler drew, or nothing."""
        if self.sampler is not None:
            layout = DraftLayout(len(inputs), self.accelerator.process_index, 0, stage.group)
            stage.sampled = self._sampled(self._draw(inputs, layout), layout, number=1)
        return stage

    def draw_rounds(self, inputs: list[dict[str, Any]], layout: DraftLayout) -> Iterator[Round]:
        """Draw all stages; TRL is left to make batches of them."""
        if self.sampler is None:
            yield from super().draw_rounds(inputs, layout)
            return
        device, drawn = self.accelerator.device, self._draw(inputs, layout)
        rows = [inputs[row] for row in layout.draft_rows]
        stage = Stage(layout.num_drafts, sampled=self._sampled(drawn, layout, number=0))
        batch = None
        with self.drafting():
            if self.trains_drafts:
                batch = self.run_stage(rows, stage)
            else:
                self.draw_and_score(rows, stage)  # all is drawn: TRL counts its tokens
        rewards = torch.tensor([each.rollout.drafts.rewards for each in drawn], device=device)
        for number in range(1, self.rounds + 1):
            refined = [
                self._refined(drawn[prompt].rollout, number) for prompt in layout.row_prompts
            ]
            stage = Stage.of_refined(
                layout.num_refinements, refined, self._sampled(drawn, layout, number=number)
            )
            yield Round(Drafts(rewards, batch), _choices(drawn, number, device), refined, stage)

    def _refined(self, rollout: Rollout, number: int) -> Refined:
        choice = rollout.choices[number - 1]
        return self.refined(rollout.stages[number].prompt, choice.draft, choice.tokens_cut)

    def _draw(self, inputs: list[dict[str, Any]], layout: DraftLayout) -> list[ScoredRollout]:
        """Draw what belongs to this rank's prompts, and exchange it: rollouts of all prompts."""
        assert self.sampler is not None
        if self._synced_step != self.state.global_step:
            sync_sampler(self.sampler, self.model, self.accelerator, self._dist)
            self._synced_step = self.state.global_step
        owned = owned_prompts(layout)
        rows = [inputs[row] for row in owned.values()]
        functions = zip(
            self.reward_func_names, self.reward_funcs, self.reward_processing_classes, strict=True
        )
        rewards = self._rewards(functions, self.reward_weights, rows)
        rollouts = draw_rollouts(
            [row["prompt"] for row in rows],
            self.sampler,
            rewards,
            num_drafts=layout.num_drafts,
            num_refinements=layout.num_refinements,
            rounds=self.rounds,
            rules=self._ranked_by(rewards, rows) if layout.num_drafts else DraftRules(),
            seed=self._seed(layout.rank, 0),
            concurrency=self.args.sampler_concurrency,
            reward_max=self.args.reward_max if layout.num_drafts else None,
        )
        mine = [
            ScoredRollout(prompt, rollout, rewards.of(rollout))
            for prompt, rollout in zip(owned, rollouts, strict=True)
        ]
        return sorted(gather_object(mine), key=lambda each: each.prompt)

    def _rewards(
        self, functions: Any, weights: Tensor, rows: list[dict[str, Any]]
    ) -> StreamedRewards:
        extras = {"trainer_state": self.state, "log_metric": self._log_metric}
        return StreamedRewards(functions, weights, rows, self.chat_template_kwargs, **extras)

    def _ranked_by(self, rewards: StreamedRewards, rows: list[dict[str, Any]]) -> DraftRules:
        """Let the rules of this batch rank by what ranks drafts, if it is not the reward."""
        score: Any = None
        if self.args.selection_reward is not None:
            score = rewards.column(self.reward_func_names.index(self.args.selection_reward))
        elif self.selection_func is not None:
            function = [("selection_func", self.selection_func, None)]
            score = self._rewards(function, torch.ones(1), rows)
        return replace(self._rules(), selection_score=score)

    def _sampled(
        self, drawn: Sequence[ScoredRollout], layout: DraftLayout, *, number: int
    ) -> Sampled:
        """Lay out the completions of a stage that this rank trains on."""
        group = layout.num_refinements if number else layout.num_drafts
        rows = layout.refinements if number else layout.drafts
        places = [(drawn[row // group], row % group) for row in rows]
        stages = [each.rollout.stages[number] for each, _ in places]
        said = [each.said[number][place] for each, place in places]
        completions = [s.completions[place] for s, (_, place) in zip(stages, places, strict=True)]
        # A skipped prompt drew nothing, and a row of TRL's must hold a token: it has no advantage.
        nothing = Completion([self._tokenizer.eos_token_id], "", [0.0])
        return Sampled(
            [
                encode_prompt(stage.prompt, self._tokenizer, self.chat_template_kwargs)
                if stage.prompt_ids is None
                else stage.prompt_ids
                for stage in stages
            ],
            [completion if completion.token_ids else nothing for completion in completions],
            torch.tensor([each.rewards for each in said], device=self.accelerator.device),
            {
                column: [each.extra.get(column) for each in said]
                for column in dict.fromkeys(name for each in said for name in each.extra)
            },
        )


def owned_prompts(layout: DraftLayout) -> dict[int, int]:
    """Find the prompts that this rank draws: those whose first row it holds; and that row.

    Examples:
        >>> owned_prompts(DraftLayout(rows=6, rank=1, num_drafts=4, num_refinements=4))
        {2: 2}
    """
    first = layout.rank * layout.rows
    starts = {prompt: prompt * layout.num_refinements - first for prompt in layout.row_prompts}
    return {prompt: row for prompt, row in starts.items() if row >= 0}


def _choices(drawn: Sequence[ScoredRollout], number: int, device: torch.device) -> DraftChoices:
    choices = [each.rollout.choices[number - 1] for each in drawn]
    columns: dict[str, list[Any]] = {
        name: [getattr(choice, name) for choice in choices]
        for name in ("index", "reward", "failed", "dropped", "skipped")
    }
    columns["plain"] = [not choice.draft for choice in choices]
    return DraftChoices(**{k: torch.tensor(v, device=device) for k, v in columns.items()})
