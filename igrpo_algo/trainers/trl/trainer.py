"""iGRPO inside TRL's `GRPOTrainer`: accelerate, FSDP, DeepSpeed, PEFT and vLLM come with it.

Stage 1 is TRL's own generation and scoring, called on the drafts with its book-keeping set aside;
Stage 2 is TRL's own batch with the prompts exchanged right before generation, so that old and
reference log-probs are taken under the spliced prompt and reward functions see the original one.
Which draft is chosen and what becomes of it is `DraftRules`; what a reward is worth is a function
of `igrpo_algo.advantages`.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from igrpo_kernels import Aggregate, Surrogate

from ...drafts.rules import DraftChoices, DraftRules
from ...early_warning import EarlyWarning
from ...rollouts.completions import Completion
from ...seeds import derive_seed
from .advantage_options import Advantage, check_advantage
from .config import IGRPOConfig
from .data_checks import check_images, check_prompts
from .draft_options import OF_RULES, rules_of
from .loss_rows import join_stages
from .metrics import count_rows, stage_metrics
from .one_stage import StageTrainer
from .stages import DraftLayout, Drafts, Refined, Stage
from .versions import warn_of_untested_trl

logger = logging.getLogger(__name__)

PAPER = {
    "title": "iGRPO: Self-Feedback-Driven LLM Reasoning",
    "id": "2602.09000",
    "citation": (
        "@article{hatamizadeh2026igrpo,\n"
        "    title        = {{iGRPO: Self-Feedback-Driven LLM Reasoning}},\n"
        "    author       = {Ali Hatamizadeh and others},\n"
        "    year         = 2026,\n"
        "    eprint       = {arXiv:2602.09000},\n"
        "}"
    ),
}
REFUSED = ("rollout_func", "environment_factory", "tools")


class IGRPOTrainer(StageTrainer):
    """Train with iGRPO: draft, keep the best draft, refine it, learn from the refinements.

    Everything that is not named here is TRL's `GRPOTrainer` and means what it means there: reward
    functions (sync, async, models, None for "cannot be scored", weights), data set columns,
    trackers, checkpoints, PEFT, vLLM in both modes. Evaluation is single-shot, as in the paper,
    unless `args.eval_with_draft`. All rows of a prompt share one draft on all ranks, however the
    group straddles them, so vLLM's server mode, which asks once per group, asks the right thing.

    `metrics.stage_metrics` lists what is logged beyond TRL's metrics, as `igrpo/...`; the trainer
    warns when these say that learning has stopped (`igrpo_algo.early_warning`). The table of
    completions has a column `draft` (`igrpo/draft` where a reward has a column of that name).

    Source: Hatamizadeh et al. 2026, arXiv:2602.09000, algorithm 1.

    Args:
        model: As TRL's.
        reward_funcs: As TRL's; the same functions score drafts and refinements.
        args: The configuration; None takes the defaults.
        train_dataset: As TRL's.
        eval_dataset: As TRL's.
        processing_class: A tokenizer; processors of images are refused.
        rules: Which draft Stage 2 sees, and how it gets into the prompt, in the place of what the
            options of `args` say.
        advantage: From rewards [P, G] to advantages [P, G]: any function of
            `igrpo_algo.advantages` or your own, in the place of `args.scale_rewards`.
        selection_func: A reward function, sync or async, that ranks drafts and is not trained on.
            It is called as the others are; what it logs with `log_extra` has no row in the table.
        surrogate: Loss of a token, in the place of what `args.loss_type` says.
        aggregate: How tokens are averaged, likewise. Where its `denominator` is None the trainer
            sets that of the accumulation window.
        **kwargs: Any other argument of `GRPOTrainer`.

    Raises:
        TypeError: `args` is not an `IGRPOConfig`.
        ValueError: Options that can't work together, or a data set with prompts that no draft can
            be spliced into; raised before anything is sampled.
    """

    _tag_names = ("trl", "grpo", "igrpo")
    _name = "iGRPO"
    _paper = PAPER

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: IGRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        rules: DraftRules | None = None,
        advantage: Advantage | None = None,
        selection_func: Callable[..., Any] | None = None,
        surrogate: Surrogate | None = None,
        aggregate: Aggregate | None = None,
        **kwargs: Any,
    ):
        warn_of_untested_trl()
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = IGRPOConfig(f"{str(name).split('/')[-1]}-iGRPO")
        if not isinstance(args, IGRPOConfig):
            raise TypeError(f"args must be an IGRPOConfig, got {type(args).__name__}")
        for name in REFUSED:
            if kwargs.get(name):
                raise ValueError(f"{name} can't be combined with the two stages of iGRPO")
        if rules is not None and (idle := args.changed(*OF_RULES)):
            raise ValueError(f"{', '.join(idle)} would have no effect beside rules")
        check_advantage(args, advantage)
        check_images(train_dataset, eval_dataset)
        _check_tokenizer(processing_class)
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            surrogate=surrogate,
            aggregate=aggregate,
            **kwargs,
        )
        _check_tokenizer(self.processing_class)
        self.advantage = advantage
        self.rules = rules or rules_of(args, self._tokenizer, self.chat_template_kwargs)
        self.selection_func = selection_func or self.rules.selection_score
        _check_selection(args.selection_reward, self.selection_func, self.reward_func_names)
        if rules is None and args.num_drafts and args.draft_choice != "none":
            check_prompts(self._tokenizer, self.chat_template_kwargs, train_dataset, eval_dataset)
        self._watch = EarlyWarning()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training, drafted = self.model.training, self.args.num_drafts > 0
        group = self.num_generations if training else self.num_generations_eval
        if not (drafted and (training or self.args.eval_with_draft)):
            no_drafts: list[str | None] = [None] * len(inputs)
            return self.run_stage(inputs, Stage(group, drafts=no_drafts if drafted else None))
        rank = self.accelerator.process_index
        layout = DraftLayout(len(inputs), rank, self.args.num_drafts, group)
        drafts = self._draw_drafts(inputs, layout)
        choices = self._choose(drafts)
        refined = self._refine(inputs, drafts, choices, layout)
        shown = [row.draft or None for row in refined]
        stage = Stage(group, [row.prompt for row in refined], shown)
        batch = self.run_stage(inputs, stage)
        skipped = choices.skipped[layout.row_prompts]
        batch["advantages"] = batch["advantages"].masked_fill(skipped, 0.0)
        self._log_stages(drafts, choices, refined, stage)
        if drafts.batch is None:
            return batch
        return join_stages(batch, drafts.batch, pad_token_id=self._tokenizer.pad_token_id)

    def _draw_drafts(self, inputs: list[dict[str, Any]], layout: DraftLayout) -> Drafts:
        rows, batch = [inputs[row] for row in layout.draft_rows], None
        stage = Stage(self.args.num_drafts)
        with self.drafting():
            if self.model.training and self.args.draft_loss_coef > 0:
                batch = self.run_stage(rows, stage)
            else:
                self.draw_and_score(rows, stage)
        scores = self.selection_scores(rows, stage)
        lengths = torch.tensor(list(map(len, stage.completion_ids)), device=self.accelerator.device)
        texts = zip(stage.completion_ids, self.texts(stage), strict=True)
        return Drafts(
            [Completion(ids, text) for ids, text in texts],
            self.accelerator.gather(lengths).view(-1, stage.group),
            self.total_rewards(stage),
            scores,
            batch,
        )

    def _choose(self, drafts: Drafts) -> DraftChoices:
        """Choose for every prompt, on all ranks alike, and alike after a resume."""
        rules = self.rules if self.model.training else replace(self.rules, dropout=0.0)
        micro_step = self._step % self.args.gradient_accumulation_steps
        step = self.args.seed, self.state.global_step, micro_step
        return rules.choose(
            drafts.rewards,
            scores=drafts.scores,
            lengths=drafts.lengths,
            seeds=[derive_seed(*step, prompt) for prompt in range(len(drafts.rewards))],
        )

    def _refine(
        self,
        inputs: list[dict[str, Any]],
        drafts: Drafts,
        choices: DraftChoices,
        layout: DraftLayout,
    ) -> list[Refined]:
        """Bring the chosen drafts to the ranks that hold their prompts, and into the prompts."""
        mine = [
            (prompt, drafts.completions[place].token_ids, drafts.completions[place].text)
            for prompt, place in layout.chosen_here(choices).items()
        ]
        chosen = {prompt: Completion(ids, text) for prompt, ids, text in gather_object(mine)}
        refined: dict[int, Refined] = {}
        for row, prompt in zip(inputs, layout.row_prompts, strict=True):
            if prompt not in refined:
                refined[prompt] = self._splice(row["prompt"], chosen.get(prompt))
        return [refined[prompt] for prompt in layout.row_prompts]

    def _splice(self, prompt: Any, draft: Completion | None) -> Refined:
        if draft is None:
            return Refined(prompt)
        spliced = self.rules.condition(prompt, draft)
        length = len(self._tokenizer(spliced.draft, add_special_tokens=False)["input_ids"])
        return Refined(spliced.prompt, spliced.draft, length, spliced.tokens_cut)

    def _log_stages(
        self, drafts: Drafts, choices: DraftChoices, refined: list[Refined], stage: Stage
    ) -> None:
        """Log both stages over all ranks, and warn where learning has stopped."""
        strip = getattr(self.rules.splice, "strip", None)
        counts = count_rows(refined, self.texts(stage), strip, self.accelerator.device)
        metrics = stage_metrics(
            drafts.rewards,
            self.total_rewards(stage),
            choices,
            self.accelerator.reduce(counts).tolist(),
            threshold=self.args.success_reward,
        )
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][f"igrpo/{name}"].append(value)
        if mode == "train":
            for warning in self._watch.see(metrics):
                if self.accelerator.is_main_process:
                    logger.warning(warning)


def _check_tokenizer(processing_class: Any) -> None:
    """Refuse a processor, before a model is loaded where it was given."""
    if isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"processing_class must be a tokenizer, got {type(processing_class).__name__}: drafts "
            "of images are not supported; for text alone pass processing_class=processor.tokenizer"
        )


def _check_selection(
    name: str | None, selection_func: Callable[..., Any] | None, known: list[str]
) -> None:
    if name is not None and selection_func is not None:
        raise ValueError("selection_reward and selection_func exclude each other")
    if name is not None and name not in known:
        raise ValueError(f"selection_reward must be one of {', '.join(known)}, got {name!r}")
