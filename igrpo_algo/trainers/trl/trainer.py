"""iGRPO inside TRL's `GRPOTrainer`: accelerate, FSDP, DeepSpeed, PEFT and vLLM come with it.

Stage 1 is TRL's own generation and scoring, called on the drafts with its book-keeping set aside;
Stage 2 is TRL's own batch with the prompts exchanged right before generation, so that old and
reference log-probs are taken under the spliced prompt and reward functions see the original one.
`DraftRules` decides which draft is chosen and what becomes of it; the advantages come from a
function of `igrpo_algo.advantages`.
"""

import logging
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from igrpo_kernels.aggregates import Aggregate
from igrpo_kernels.surrogates import Surrogate

from ...drafts.random_tokens import RandomTokens
from ...drafts.rules import DraftRules
from ...early_warning import EarlyWarning
from ...rollouts.sampling import AnySampler
from ..draft_layout import DraftLayout
from .advantage_options import Advantage, check_advantage
from .config import IGRPOConfig
from .data_checks import check_images, check_prompts
from .draft_options import OF_RULES, rules_of
from .loss_rows import join_stages
from .metrics import count_rows, mean_over_rounds, stage_metrics
from .sampled_stages import SampledTrainer
from .sampler import check_sampler_options
from .stages import Round, Stage
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


class IGRPOTrainer(SampledTrainer):
    """Train with iGRPO: draft, keep the best draft, refine it, learn from the refinements.

    Everything else works as in TRL's `GRPOTrainer`: reward functions (sync, async, models, None for
    "cannot be scored", weights), data set columns, trackers, checkpoints, PEFT, vLLM in both modes.
    Evaluation is single-shot, as in the paper, unless `args.eval_with_draft`. All rows of a prompt
    share one draft, even where its group is split over ranks, so vLLM's server mode, which
    generates once per group, gets the right prompt.

    `metrics.stage_metrics` lists what is logged beyond TRL's metrics, as `igrpo/...`; the trainer
    warns when these show that learning has stopped (`igrpo_algo.early_warning`). The table of
    completions has a column `draft` (`igrpo/draft` where a reward has a column of that name).

    Source: Hatamizadeh et al. 2026, arXiv:2602.09000, algorithm 1.

    Args:
        model: As TRL's.
        reward_funcs: As TRL's; the same functions score drafts and refinements.
        args: The configuration; None takes the defaults.
        train_dataset: As TRL's.
        eval_dataset: As TRL's.
        processing_class: A tokenizer; processors of images are refused.
        rules: Which draft Stage 2 sees, and how it gets into the prompt, in place of what the
            options of `args` say.
        advantage: From rewards [P, G] to advantages [P, G]: any function of
            `igrpo_algo.advantages` or your own, in place of `args.scale_rewards`.
        sampler: Draws both stages in place of TRL's generation: any sampler of
            `igrpo_algo.engines`, or your own. With one that has `sample_one`, as vLLM's, no prompt
            waits for another's drafts (`stream_two_stage_rollout`); the others draw stage by stage.
            Its `sync_weights` gets the weights after each update, and its log-probs feed TRL's
            importance correction (`vllm_importance_sampling_...`). Each rank draws the prompts
            whose first row it holds.
        selection_func: A reward function, sync or async, that ranks drafts and is not trained on.
            It is called as the others are; what it logs with `log_extra` has no row in the table.
        surrogate: Loss of a token, in place of what `args.loss_type` says.
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
        sampler: AnySampler | None = None,
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
        _check_draft_values(args, rules, selection_func)
        check_advantage(args, advantage)
        check_sampler_options(args, sampler)
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
        self.sampler = sampler
        if sampler is not None:
            self.use_vllm = True  # TRL's name for "the log-probs of what was drawn are given"
        self.rules = rules or rules_of(args, self._tokenizer, self.chat_template_kwargs)
        self.selection_func = selection_func or self.rules.selection_score
        _check_selection(args.selection_reward, self.selection_func, self.reward_func_names)
        if rules is None and args.num_drafts and args.draft_choice != "none":
            check_prompts(self._tokenizer, self.chat_template_kwargs, train_dataset, eval_dataset)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training, drafted = self.model.training, self.args.num_drafts > 0
        group = self.num_generations if training else self.num_generations_eval
        if not (drafted and (training or self.args.eval_with_draft)):
            stage = Stage(group, drafts=[None] * len(inputs) if drafted else None)
            return self.run_stage(inputs, self.draw_one_stage(inputs, stage))
        rank = self.accelerator.process_index
        layout = DraftLayout(len(inputs), rank, self.args.num_drafts, group)
        batches, seen, drafts = [], [], None
        for each in self.draw_rounds(inputs, layout):
            batch = self.run_stage(inputs, each.stage)
            skipped = each.choices.skipped[layout.row_prompts]
            batch["advantages"] = batch["advantages"].masked_fill(skipped, 0.0)
            seen.append(self._log_stages(each))
            batches.append(batch)
            drafts = each.drafts.batch
        if training:
            self._warn(mean_over_rounds(seen))
        return join_stages(batches, drafts, pad_token_id=self._tokenizer.pad_token_id)

    @cached_property
    def _watch(self) -> EarlyWarning:
        """Watches the run; after a resume it has seen what was logged before, and said it."""
        watch = EarlyWarning()
        for row in self.state.log_history:
            watch.see(
                {
                    name.removeprefix("igrpo/"): math.nan if value is None else value  # as saved
                    for name, value in row.items()
                    if name.startswith("igrpo/")
                }
            )
        return watch

    def _log_stages(self, both: Round) -> dict[str, float]:
        """Log both stages over all ranks, and return what was logged."""
        strip = getattr(self.rules.splice, "strip", None)
        if isinstance(strip, RandomTokens):  # drawn for the draft, not for what may repeat it
            strip = strip.strip
        counts = count_rows(both.refined, self.texts(both.stage), strip, self.accelerator.device)
        metrics = stage_metrics(
            both.drafts.rewards,
            self.total_rewards(both.stage),
            both.choices,
            self.accelerator.reduce(counts).tolist(),
            threshold=self.args.success_reward,
        )
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][f"igrpo/{name}"].append(value)
        return metrics

    def _warn(self, metrics: dict[str, float]) -> None:
        """Warn if a training batch shows that learning has stopped."""
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
    if processing_class is not None and processing_class.eos_token is None:
        raise ValueError("processing_class must have an eos_token: completions end with it")


def _check_draft_values(
    args: IGRPOConfig, rules: DraftRules | None, selection_func: Callable[..., Any] | None
) -> None:
    """Refuse values that others would leave without effect."""
    given = {"rules": rules, "selection_func": selection_func}
    idle = [name for name, value in given.items() if value is not None]
    if idle and (args.num_drafts == 0 or args.draft_choice == "none"):
        raise ValueError(f"{', '.join(idle)} would have no effect without drafts to choose from")
    if rules is not None and (changed := args.changed(*OF_RULES)):
        raise ValueError(f"{', '.join(changed)} would have no effect beside rules")
    if rules is not None and rules.selection_score is not None and selection_func is not None:
        raise ValueError("selection_func and the rules' selection_score exclude each other")


def _check_selection(
    name: str | None, selection_func: Callable[..., Any] | None, known: list[str]
) -> None:
    if name is not None and selection_func is not None:
        raise ValueError("selection_reward and selection_func exclude each other")
    if name is not None and name not in known:
        raise ValueError(f"selection_reward must be one of {', '.join(known)}, got {name!r}")
