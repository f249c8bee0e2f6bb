"""iGRPO inside TRL's `GRPOTrainer`: accelerate, FSDP, DeepSpeed, PEFT and vLLM come with it.

Stage 1 is TRL's own generation and scoring, called on the drafts with its book-keeping set aside;
Stage 2 is TRL's own batch with the prompts exchanged right before generation, so that old and
reference log-probs are taken under the spliced prompt and reward functions see the original one.
"""

import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from igrpo_kernels.aggregates import Aggregate
from igrpo_kernels.surrogates import Surrogate

from ..advantages import sum_rewards
from ..markers import marker_tokens
from ..prompts import strip_thinking
from ..sampling import derive_seed, run_blocking
from ..splicing import TextSplice, TokenBudget
from .trl_config import IGRPOConfig
from .trl_drafts import (
    DraftChoice,
    DraftLayout,
    Refined,
    choose_drafts,
    splice_or_leave,
)
from .trl_loss import join_stages
from .trl_metrics import count_rows, stage_metrics
from .trl_policy_loss import PolicyLossTrainer

logger = logging.getLogger(__name__)

COPIES_TAKE_OVER = 0.5
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


class Drafts(NamedTuple):
    """What Stage 1 drew, and TRL's batch of it where drafts are trained too.

    Attributes:
        ids: Token ids of the drafts on this rank.
        lengths: Tokens of each draft, those of all ranks. Shape [P, N].
        rewards: The training reward of each. Shape [P, N].
        scores: What ranks them. Shape [P, N].
        batch: Rows for the loss, or None.
    """

    ids: list[list[int]]
    lengths: Tensor
    rewards: Tensor
    scores: Tensor
    batch: dict[str, Any] | None


class IGRPOTrainer(PolicyLossTrainer):
    """Train with iGRPO: draft, keep the best draft, refine it, learn from the refinements.

    Everything that is not named here is TRL's `GRPOTrainer` and means what it means there: reward
    functions (sync, async, models, None for "cannot be scored", weights), data set columns,
    trackers, checkpoints, PEFT, vLLM in both modes. Evaluation is single-shot, as in the paper,
    unless `args.eval_with_draft`. All rows of a prompt share one draft on all ranks, however the
    group straddles them, so vLLM's server mode, which asks once per group, asks the right thing.

    `trl_metrics.stage_metrics` lists what is logged beyond TRL's metrics, as `igrpo/...`.

    Source: Hatamizadeh et al. 2026, arXiv:2602.09000, algorithm 1.

    Args:
        model: As TRL's.
        reward_funcs: As TRL's; the same functions score drafts and refinements.
        args: The configuration.
        train_dataset: As TRL's.
        eval_dataset: As TRL's.
        processing_class: A tokenizer; processors of images are refused.
        surrogate: Loss of a token, in the place of what `args.loss_type` says.
        aggregate: How tokens are averaged, likewise. Where its `denominator` is None the trainer
            sets that of the accumulation window.
        selection_func: A reward function, sync or async, that ranks drafts and is no training
            reward.
        **kwargs: Any other argument of `GRPOTrainer`.

    Raises:
        TypeError: `args` is no `IGRPOConfig`.
        ValueError: Options that can't work together; raised before anything is sampled.
    """

    _tag_names = ("trl", "grpo", "igrpo")
    _name = "iGRPO"
    _paper = PAPER

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: IGRPOConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        surrogate: Surrogate | None = None,
        aggregate: Aggregate | None = None,
        selection_func: Callable[..., Any] | None = None,
        **kwargs: Any,
    ):
        if not isinstance(args, IGRPOConfig):
            raise TypeError(f"args must be an IGRPOConfig, got {type(args).__name__}")
        _check_arguments(kwargs, train_dataset, eval_dataset)
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
        if self._is_vlm:
            raise ValueError("processing_class must be a tokenizer: drafts of images are not there")
        _check_selection(args.selection_reward, selection_func, self.reward_func_names)
        self.selection_func = selection_func
        self.splice = self._make_splice()
        self._spliced: list[Any] | None = None
        self._sampled: tuple[list[Any], list[list[int]]] = ([], [])
        self._rewards_per_func = torch.empty(0, 0)
        self._warned_of_copies = False

    def _make_splice(self) -> TextSplice:
        args, budget = self.args, None
        if args.max_draft_length is not None or args.max_spliced_prompt_length is not None:
            budget = TokenBudget(
                self._tokenizer,
                args.max_draft_length,
                args.max_spliced_prompt_length,
                args.draft_keep,
                self.chat_template_kwargs,
            )
        return TextSplice(
            args.make_draft_template(),
            strip_thinking if args.strip_draft_thinking else None,
            marker_tokens(self._tokenizer),
            budget,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training = self.model.training
        if not training and not self.args.eval_with_draft:
            self._log_drafts([None] * len(inputs))
            return super()._generate_and_score_completions(inputs)
        layout = DraftLayout(
            len(inputs),
            self.accelerator.process_index,
            self.args.num_drafts,
            self.num_generations if training else self.num_generations_eval,
        )
        drafts = self._draw_drafts(inputs, layout, train_drafts=training)
        choice = choose_drafts(
            drafts.scores, drafts.lengths, self.args, self._generator(), drop=training
        )
        refined = self._splice_chosen(inputs, drafts, choice, layout)
        self._log_drafts([row.draft for row in refined])
        self._spliced = [row.prompt for row in refined]
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            self._spliced = None
        self._log_stages(drafts, choice, refined, layout.num_refinements)
        skipped = choice.skipped[layout.row_prompts]
        batch["advantages"] = batch["advantages"].masked_fill(skipped, 0.0)
        if drafts.batch is None:
            return batch
        return join_stages(batch, drafts.batch, pad_token_id=self._tokenizer.pad_token_id)

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        result = super()._generate(prompts if self._spliced is None else self._spliced)
        self._sampled = result[3], result[1]
        return result

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    def _draw_drafts(
        self, inputs: list[dict[str, Any]], layout: DraftLayout, *, train_drafts: bool
    ) -> Drafts:
        rows = [inputs[row] for row in layout.draft_rows]
        prompts = [row["prompt"] for row in rows]
        batch = None
        with self._drafting():
            if train_drafts and self.args.draft_loss_coef > 0:
                batch = super()._generate_and_score_completions(rows)
            else:
                _, ids, _, completions, *_ = self._generate(prompts)
                self._calculate_rewards(rows, prompts, completions, ids)
        completions, ids = self._sampled
        rewards = self._total_rewards()
        scores = self._selection_scores(rows, completions, ids, rewards)
        lengths = self.accelerator.gather(
            torch.tensor([len(draft) for draft in ids], device=self.accelerator.device)
        )
        shape = (-1, self.args.num_drafts)
        return Drafts(ids, lengths.view(shape), rewards.view(shape), scores.view(shape), batch)

    @contextmanager
    def _drafting(self) -> Iterator[None]:
        """Make TRL draw `num_drafts` of each prompt, its metrics and tables set aside."""
        fresh = {
            "num_generations": self.args.num_drafts,
            "num_generations_eval": self.args.num_drafts,
            "_metrics": {mode: defaultdict(list) for mode in self._metrics},
            "_logs": {
                name: defaultdict(list) if isinstance(log, defaultdict) else []
                for name, log in self._logs.items()
            },
            "_pending_extra_logs": defaultdict(list),
            "_pending_metrics": defaultdict(list),
        }
        kept = {name: getattr(self, name) for name in fresh}
        for name, value in fresh.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    def _total_rewards(self) -> Tensor:
        rewards = self._rewards_per_func
        return sum_rewards(rewards, self.reward_weights.to(rewards.device))

    def _selection_scores(
        self,
        rows: list[dict[str, Any]],
        completions: list[Any],
        ids: list[list[int]],
        rewards: Tensor,
    ) -> Tensor:
        if self.args.selection_reward is not None:
            column = self.reward_func_names.index(self.args.selection_reward)
            return self._rewards_per_func[:, column]
        if self.selection_func is None:
            return rewards
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        scores = self.selection_func(
            prompts=[row["prompt"] for row in rows],
            completions=completions,
            completion_ids=ids,
            trainer_state=self.state,
            **columns,
        )
        if inspect.isawaitable(scores):
            scores = run_blocking(_await(scores))
        if len(scores) != len(rows):
            raise ValueError(
                f"selection_func must return one score per draft: {len(scores)} scores "
                f"for {len(rows)} drafts"
            )
        known = [torch.nan if score is None else score for score in scores]
        device = self.accelerator.device
        return self.accelerator.gather(torch.tensor(known, dtype=torch.float32, device=device))

    def _generator(self) -> torch.Generator:
        """Make the source of ties, controls and dropout: one on all ranks, and after a resume."""
        micro_step = self._step % self.args.gradient_accumulation_steps
        seed = derive_seed(self.args.seed, self.state.global_step, micro_step)
        return torch.Generator().manual_seed(seed)

    def _splice_chosen(
        self,
        inputs: list[dict[str, Any]],
        drafts: Drafts,
        choice: DraftChoice,
        layout: DraftLayout,
    ) -> list[Refined]:
        """Bring the chosen drafts to the ranks that hold their prompts, and into the prompts."""
        wanted = choice.draft.masked_fill(choice.plain, -1).tolist()
        mine = []
        for prompt, index in enumerate(wanted):
            draft = prompt * self.args.num_drafts + index
            if index >= 0 and draft in layout.drafts:
                mine.append((prompt, drafts.ids[draft - layout.drafts.start]))
        chosen = dict(gather_object(mine))
        refined: dict[int, Refined] = {}
        for row, prompt in zip(inputs, layout.row_prompts, strict=True):
            if prompt in refined:
                continue
            if prompt in chosen:
                refined[prompt] = splice_or_leave(
                    row["prompt"], chosen[prompt], self.splice, self._tokenizer
                )
            else:
                refined[prompt] = Refined(row["prompt"])
        return [refined[prompt] for prompt in layout.row_prompts]

    def _log_drafts(self, drafts: list[str | None]) -> None:
        """Give the table of completions a column of drafts, one for every row that it gets."""
        if self.log_completions:
            self._log_completion_extra("draft", drafts)

    def _log_stages(
        self, drafts: Drafts, choice: DraftChoice, refined: list[Refined], group: int
    ) -> None:
        """Log both stages over all ranks, and warn once when copies take over."""
        counts = count_rows(
            refined, self._sampled[1], self.splice, self._tokenizer, self.accelerator.device
        )
        metrics = stage_metrics(
            drafts.rewards,
            self._total_rewards().view(-1, group),
            choice,
            self.accelerator.reduce(counts).tolist(),
        )
        mode = "train" if self.model.training else "eval"
        for name, value in metrics.items():
            self._metrics[mode][f"igrpo/{name}"].append(value)
        if metrics["copied"] > COPIES_TAKE_OVER and not self._warned_of_copies:
            self._warned_of_copies = True
            if self.accelerator.is_main_process:
                logger.warning(
                    "%.0f %% of the refinements repeat their draft: Stage 2 pays for copying and "
                    "teaches little. See draft_dropout, draft_loss_coef and draft_choice.",
                    100 * metrics["copied"],
                )


async def _await(scores: Any) -> Any:
    return await scores


def _check_arguments(kwargs: dict[str, Any], *datasets: Any) -> None:
    """Refuse what Stage 1 cannot do, before a model is loaded."""
    for name in REFUSED:
        if kwargs.get(name):
            raise ValueError(f"{name} can't be combined with the two stages of iGRPO")
    for dataset in datasets:
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            columns = getattr(part, "column_names", None) or []
            if "image" in columns or "images" in columns:
                raise ValueError("a data set with images can't be combined with iGRPO's drafts")


def _check_selection(
    name: str | None, selection_func: Callable[..., Any] | None, known: list[str]
) -> None:
    if name is not None and selection_func is not None:
        raise ValueError("selection_reward and selection_func exclude each other")
    if name is not None and name not in known:
        raise ValueError(f"selection_reward must be one of {', '.join(known)}, got {name!r}")
