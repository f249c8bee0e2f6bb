"""iGRPO in Unsloth 2026.10: its rewritten `GRPOTrainer`, with drafts.

    import unsloth
    from igrpo_algo.trainers.unsloth import make_trainer
    IGRPOTrainer = make_trainer(num_drafts=8)
    IGRPOTrainer(model=model, args=GRPOConfig(...), reward_funcs=..., ...).train()

Unsloth rewrites TRL's trainer when it is imported, its loss and log-probs among it, so this touches
neither: both stages go through TRL's generation (Unsloth's vLLM too), and a step is trained by
Unsloth's own loss, which is equation 5 of the paper with `loss_type="grpo"`. `IGRPOTrainer` has
losses that Unsloth would pass over. Evaluation is single-shot.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from igrpo_kernels.checks import check_count

from ..advantages.of_groups import sum_rewards
from ..drafts.rules import DraftRules
from ..rollouts.completions import Completion
from ..rollouts.once_per_group import check_rules, fit_to_tokenizer
from .draft_layout import DraftLayout
from .gathered import log_stages, share_drafts
from .refusals import refuse_media, refuse_on, refuse_templated
from .versions import requires

with requires("unsloth", "2026.10", "2026.10"):
    import unsloth  # noqa: F401  # before TRL, so that it can rewrite it
    import trl  # isort: skip


def make_trainer(
    *,
    rules: DraftRules = DraftRules(),  # frozen
    num_drafts: int = 4,
    max_prompt_tokens: int | None = None,
) -> type[Any]:
    """Make iGRPO's trainer from `trl.GRPOTrainer` as it is now: Unsloth's.

    Prompts are chat messages or plain strings, without images and tools. A prompt whose drafts all
    failed can't be skipped here: TRL trains on every row that it sampled.

    Args:
        rules: How a draft is chosen and spliced.
        num_drafts: N. `num_drafts` times the rows on a rank must be divisible by G.
        max_prompt_tokens: Maximum tokens of a spliced prompt; a draft is cut to it. None sets no
            limit, and `max_seq_length` of the model must leave room.

    Returns:
        A subclass, with the arguments of `GRPOTrainer`.

    Raises:
        TypeError: `rules` is not `DraftRules`, or a count not an int.
        ValueError: A count is below 1, the rules leave prompts out of Stage 2 or have a
            `selection_score`.
    """
    if max_prompt_tokens is not None:
        check_count("max_prompt_tokens", max_prompt_tokens)
    own = {
        "rules": check_rules(rules, by_reward_alone=True),
        "num_drafts": check_count("num_drafts", num_drafts),
        "max_prompt_tokens": max_prompt_tokens,
    }
    return type("IGRPOTrainer", (_TwoStages, trl.GRPOTrainer), own)


_Trainer: Any = object  # known when the class is made: Unsloth's


class _TwoStages(_Trainer):
    """Draws drafts before TRL draws a batch, and gives it the spliced prompts."""

    rules: DraftRules
    num_drafts: int
    max_prompt_tokens: int | None
    _rows: list[dict[str, Any]] | None = None
    _draft_rewards: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in ("tools", "environment_factory", "rollout_func"):
            refuse_on(name, kwargs.get(name), "a draft is one answer that TRL draws")
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self: Any, inputs: list[dict[str, Any]]) -> Any:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._rows = inputs
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self._rows = None

    def _generate(self: Any, prompts: list[Any], *args: Any) -> tuple[Any, ...]:
        rows, self._rows = self._rows, None
        if rows is None:
            return super()._generate(prompts, *args)
        for row in rows:
            refuse_templated(row["prompt"], self._tokens, "don't apply it to the data set")
            refuse_media(any(row.get(name) is not None for name in ("image", "images")))
        return super()._generate(self._spliced(rows, *args), *args)

    @property
    def _tokens(self: Any) -> Any:
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def _spliced(self: Any, rows: list[dict[str, Any]], *args: Any) -> list[Any]:
        """Run Stage 1 and give the Stage-2 prompt of each row, the same for a group everywhere."""
        rank = self.accelerator.process_index
        layout = DraftLayout(len(rows), rank, self.num_drafts, self.num_generations)
        mine = [rows[row] for row in layout.draft_rows]
        prompts = [row["prompt"] for row in mine]
        with self._drafting():
            _, ids, _, texts, *_ = super()._generate(prompts, *args)
            per_function = self._calculate_rewards(mine, prompts, texts, ids)
        weights = self.reward_weights.to(per_function.device)
        rewards = sum_rewards(per_function, weights).view(-1, self.num_drafts)
        drafts = [Completion.decoded(each, self._tokens) for each in ids]
        step = (self.state.global_step, self._step)
        chosen = share_drafts(self.rules, rewards, drafts, layout, self.args.seed, *step)
        rules = fit_to_tokenizer(self.rules, self._tokens, self.max_prompt_tokens)
        self._draft_rewards = rewards
        return [
            rules.condition(row["prompt"], chosen[prompt]).prompt
            if prompt in chosen
            else row["prompt"]
            for row, prompt in zip(rows, layout.row_prompts, strict=True)
        ]

    @contextmanager
    def _drafting(self: Any) -> Iterator[None]:
        """Let TRL draw N of each prompt, and keep its metrics and tables for the refinements."""
        aside = {
            "num_generations": self.num_drafts,
            "_metrics": {mode: defaultdict(list) for mode in self._metrics},
            "_pending_extra_logs": defaultdict(list),
            "_pending_metrics": defaultdict(list),
        }
        kept = {name: getattr(self, name) for name in aside}
        vars(self).update(aside)
        try:
            yield
        finally:
            vars(self).update(kept)

    def _calculate_rewards(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        per_function: torch.Tensor = super()._calculate_rewards(*args, **kwargs)
        drafts, self._draft_rewards = self._draft_rewards, None
        if drafts is not None:  # these are their refinements
            rewards = sum_rewards(per_function, self.reward_weights.to(per_function.device))
            refinements = rewards.view(-1, self.num_generations)
            log_stages(self._metrics["train"], drafts, refinements)
        return per_function
