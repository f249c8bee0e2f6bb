"""The options of `IGRPOTrainer`: TRL's `GRPOConfig` plus what the two stages add."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from trl import GRPOConfig

from igrpo_kernels.checks import check_count, check_number

from ...drafts.text import PAPER_TEMPLATE, DraftTemplate
from ...fields import check_fields
from .draft_options import CHOICES, OF_DRAFTS, OF_SPLICE, template_of
from .trl_options import check_trl_options

GROUP = ("num_refinements", "num_generations")
BATCH = ("steps_per_generation", "generation_batch_size")
COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_iterations",
)


class Derived(int):
    """A number that the configuration worked out: `dataclasses.replace` works it out again."""


@dataclass
class IGRPOConfig(GRPOConfig):
    """Arguments of `IGRPOTrainer`, with the algorithm of the paper as defaults.

    Two defaults of TRL are changed, because the paper's equation 5 says otherwise:
    `loss_type="grpo"` (mean over the tokens of a sequence, then over sequences; TRL: "dapo") and
    `use_bias_correction_kl=False` (plain k3; TRL: True).

    Batches are counted in refinements: `generation_batch_size` holds
    `generation_batch_size / num_refinements` prompts, and each prompt costs `num_drafts` more
    completions in Stage 1. With `draft_loss_coef > 0` every micro-batch of
    `per_device_train_batch_size` refinements carries
    `per_device_train_batch_size * num_drafts / num_refinements` drafts besides; with
    `refinement_rounds` > 1, as many refinements again for each further round.

    Source: Hatamizadeh et al. 2026, arXiv:2602.09000, sections 3 and 4.1.

    Args:
        num_drafts: N, completions of each prompt in Stage 1. 0 is plain GRPO: one stage.
        num_refinements: G, completions of each spliced prompt in Stage 2; None takes
            `num_generations`, and 4 without it.
        num_generations: TRL's name for the same number.
        refinement_rounds: Rounds of Stage 2, of `num_refinements` each. Every round chooses among
            all completions so far, drafts and refinements, and is trained under its own prompts,
            with advantages over its own group. Metrics are means over the rounds, and the table
            of completions shows the last. Evaluation refines once.
        draft_choice: Which draft Stage 2 sees: "best" (the paper), or a control: "random", "worst",
            "best_wrong" (none where all are right), "random_tokens" (as many as the best draft
            has), "none" (drafts are drawn and scored, and the prompt stays plain).
        draft_ties: Which of several best drafts: "lowest_index", "random" or "shortest" (in
            tokens, then lowest index).
        all_drafts_failed: What a prompt without a right draft does: "condition" on the best of the
            wrong ones (the paper's literal reading), "plain_prompt", or "skip" (plain prompt and
            zero advantages; a trainer's `sampler` draws no refinements then). A prompt none of
            whose drafts could be scored stays plain in any case.
        all_drafts_right: The same for a prompt whose drafts are all right: with "plain_prompt"
            it sees drafts only where they differ or have all failed.
        success_reward: The training reward from which a draft or a refinement counts as right.
        selection_reward: Name of the one reward function that ranks drafts; None ranks by the
            weighted sum that Stage 2 is trained on. A function that is not trained on goes to the
            trainer as `selection_func`.
        strip_draft_thinking: Whether the thinking part of a draft is left out of the prompt.
        max_draft_length: Tokens of the draft that may enter the prompt; None sets no limit.
        max_spliced_prompt_length: Tokens of the whole spliced prompt, chat template included; None
            sets no limit. The draft is cut to fit, the question never; without room for one token
            of the draft the prompt stays plain.
        draft_keep: Which end of a draft survives the cut: "tail" (where answers stand) or "head".
        draft_template: A `DraftTemplate`, or its fields as a dict or as JSON;
            None takes `DEFAULT_TEMPLATE`. Special tokens of the tokenizer and the template's
            delimiters are neutralized in a draft in any case.
        reward_max: With a trainer's `sampler`: the reward's known maximum. The first draft that
            reaches it is chosen, and the prompt's other drafts are cancelled. None waits for all.
        sampler_concurrency: With a trainer's `sampler`: most completions asked for at a time.
        draft_dropout: Beyond the paper: share of prompts that stay plain in Stage 2.
        draft_loss_coef: Beyond the paper: weight of the drafts' own loss, with advantages over
            their own group and log-probs under the original prompt. 0 trains on Stage 2 alone.
        eval_with_draft: Evaluate draft-then-refine instead of single-shot.
        use_trl_loss: Take TRL's `_compute_loss` in place of `igrpo_kernels.linear_policy_loss`.
        skip_zero_advantages: Leave completions of zero advantage out of forward and backward, where
            neither KL, entropy nor a mixture of experts needs them. In place of `entropy` and
            `ratio` the trainer then logs `entropy/nonzero_advantage` and `ratio/nonzero_advantage`,
            the means over the others of each micro-batch, averaged over micro-batches.

    Raises:
        ValueError: A value out of range, or options that exclude each other.
        TypeError: A count that is not an int.

    Examples:
        >>> args = IGRPOConfig("out", num_drafts=6, num_refinements=2, bf16=False, report_to="none")
        >>> args.num_generations, args.loss_type, args.draft_choice
        (2, 'grpo', 'best')
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "draft_template"]  # noqa: RUF012

    num_generations: int | None = field(
        default=None, metadata={"help": "TRL's name for num_refinements."}
    )
    loss_type: str = "grpo"
    use_bias_correction_kl: bool = False

    num_drafts: int = field(default=4, metadata={"help": "Completions of each prompt in Stage 1."})
    num_refinements: int | None = field(
        default=None,
        metadata={"help": "Completions of each spliced prompt in Stage 2; 4 if not given."},
    )
    refinement_rounds: int = field(
        default=1, metadata={"help": "Rounds of Stage 2; each refines the best completion so far."}
    )
    draft_choice: str = field(
        default="best",
        metadata={
            "help": "Draft of Stage 2: best, random, worst, best_wrong, random_tokens or none."
        },
    )
    draft_ties: str = field(
        default="lowest_index",
        metadata={"help": "Which of several best drafts: lowest_index, random or shortest."},
    )
    all_drafts_failed: str = field(
        default="condition",
        metadata={"help": "Prompts without a right draft: condition, plain_prompt or skip."},
    )
    all_drafts_right: str = field(
        default="condition",
        metadata={"help": "Prompts whose drafts are all right: condition, plain_prompt or skip."},
    )
    success_reward: float = field(
        default=1.0, metadata={"help": "Reward from which a completion counts as right."}
    )
    selection_reward: str | None = field(
        default=None, metadata={"help": "Name of the one reward function that ranks drafts."}
    )
    strip_draft_thinking: bool = field(
        default=True, metadata={"help": "Leave the draft's thinking out of the prompt."}
    )
    max_draft_length: int | None = field(
        default=None, metadata={"help": "Tokens of the draft that may enter the prompt."}
    )
    max_spliced_prompt_length: int | None = field(
        default=None, metadata={"help": "Tokens of the spliced prompt; the draft is cut to fit."}
    )
    draft_keep: str = field(
        default="tail", metadata={"help": "End of a draft that survives the cut: tail or head."}
    )
    draft_template: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Text before and after the draft, as a DraftTemplate."}
    )
    reward_max: float | None = field(
        default=None, metadata={"help": "Maximum of the reward: a draft that has it is chosen."}
    )
    sampler_concurrency: int = field(
        default=256, metadata={"help": "Most completions asked of the sampler at a time."}
    )
    draft_dropout: float = field(
        default=0.0, metadata={"help": "Share of prompts that stay plain in Stage 2."}
    )
    draft_loss_coef: float = field(
        default=0.0, metadata={"help": "Weight of the drafts' own loss; 0 trains on Stage 2 alone."}
    )
    eval_with_draft: bool = field(
        default=False, metadata={"help": "Evaluate draft-then-refine instead of single-shot."}
    )
    use_trl_loss: bool = field(
        default=False, metadata={"help": "Take TRL's loss in place of igrpo_kernels'."}
    )
    skip_zero_advantages: bool = field(
        default=True, metadata={"help": "Leave completions of zero advantage out of the forward."}
    )

    @classmethod
    def paper(cls, output_dir: str, **overrides: Any) -> "IGRPOConfig":
        """Build the settings that the paper reports.

        From the paper (section 4.1, appendix C): 4 drafts and 4 refinements, learning rate 1e-6
        with `cosine_with_min_lr` down to a tenth and a tenth of the steps as warm-up, no KL, no
        entropy bonus, temperature 0.7, completions of 4,096 tokens, one epoch, sequence mean,
        rewards standardized by group, bf16 with gradient checkpointing, micro-batches of 16 with 8
        accumulation steps.

        The paper does not specify the following, and this preset chooses:

        - clip bounds: 0.2 on both sides; top-p 1;
        - updates per batch: one (`num_iterations=1`), so that every ratio is 1;
        - ties between drafts: the lowest index;
        - all drafts wrong: condition on the first of the best, as the arg max reads;
        - the text that joins question and draft: `igrpo_algo.drafts.text.PAPER_TEMPLATE`, in the
          last user message;
        - the draft's thinking: left out, so that what is shown is the answer;
        - "maximum prompt length 1,024" beside drafts of 4,096: the spliced prompt may hold
          1,024 + 4,096 tokens, and what is longer loses the head of the draft;
        - std with ddof 1 and eps 1e-4, as TRL has them.

        Args:
            output_dir: Where checkpoints go.
            **overrides: Any argument of the class.

        Returns:
            The configuration.
        """
        paper: dict[str, Any] = {
            "num_drafts": 4,
            "num_refinements": 4,
            "draft_template": PAPER_TEMPLATE,
            "learning_rate": 1e-6,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": 0.1,
            "num_train_epochs": 1,
            "beta": 0.0,
            "temperature": 0.7,
            "max_completion_length": 4096,
            "max_spliced_prompt_length": 1024 + 4096,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 8,
        }
        if overrides.get("num_drafts") == 0 or overrides.get("draft_choice") == "none":
            del paper["max_spliced_prompt_length"], paper["draft_template"]
        return cls(output_dir, **paper | overrides)

    def changed(self, *names: str) -> list[str]:
        """Name those of some options that do not have their default."""
        known = self.__dataclass_fields__
        return [name for name in names if getattr(self, name) != known[name].default]

    def __post_init__(self) -> None:
        if isinstance(self.draft_template, DraftTemplate):
            self.draft_template = asdict(self.draft_template)
        if getattr(self, "activation_checkpointing", False) is None:
            # TRL's default stands under the old name, of which transformers warns.
            self.activation_checkpointing = self.gradient_checkpointing
        check_fields(self, IGRPOConfig.__annotations__)  # TRL's own do not hold what they declare
        check_count("num_drafts", self.num_drafts, at_least=0)
        for name in COUNTS:
            check_count(name, getattr(self, name))
        derived = self._work_out_sizes(super().__post_init__)
        for name in derived:
            setattr(self, name, Derived(getattr(self, name)))
        template_of(self.draft_template)
        self._check_values()
        check_trl_options(self)
        self._check_combinations()

    def _work_out_sizes(self, by_trl: Callable[[], None]) -> list[str]:
        """Set the sizes that are not given, and name them."""
        given = {name: getattr(self, name) for name in (*GROUP, *BATCH)}
        derived = [n for n, v in given.items() if v is None or isinstance(v, Derived)]
        groups = {name: given[name] for name in GROUP if name not in derived}
        for name, size in given.items():
            if name not in derived:
                check_count(name, size, at_least=2 if name in GROUP else 1)
        if len(set(groups.values())) > 1:
            raise ValueError(f"num_refinements and num_generations are one number, got {groups}")
        # A stored configuration has both sizes of the batch; TRL takes one of them.
        stored = None if {*BATCH} & {*derived} else self.generation_batch_size
        for name in derived if stored is None else [*derived, "generation_batch_size"]:
            setattr(self, name, None)
        self.num_refinements = self.num_generations = next(iter(groups.values()), 4)
        by_trl()
        if stored not in (None, self.generation_batch_size):
            raise ValueError(
                f"generation_batch_size = {stored} is not what steps_per_generation = "
                f"{self.steps_per_generation} makes it, {self.generation_batch_size}: give one"
            )
        return derived

    def _check_values(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("max_draft_length", "max_spliced_prompt_length"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_count("refinement_rounds", self.refinement_rounds)
        check_count("sampler_concurrency", self.sampler_concurrency)
        check_number("draft_dropout", self.draft_dropout, at_least=0.0, at_most=1.0)
        check_number("draft_loss_coef", self.draft_loss_coef, at_least=0.0)
        check_number("success_reward", self.success_reward)
        if self.reward_max is not None:
            check_number("reward_max", self.reward_max)
        for index, weight in enumerate(self.reward_weights or []):
            check_number(f"reward_weights[{index}]", weight)

    def _check_combinations(self) -> None:
        self._check_draft_share()
        if self.num_drafts == 0 and (idle := self.changed(*OF_DRAFTS)):
            raise ValueError(f"{', '.join(idle)} would have no effect with num_drafts=0")
        if self.draft_choice == "none":
            idle = self.changed("draft_ties", "draft_dropout", "reward_max", "eval_with_draft")
            idle += self.changed("all_drafts_failed", "all_drafts_right", "selection_reward")
            idle += self.changed(*OF_SPLICE)
            if idle:
                raise ValueError(f"{', '.join(idle)} would have no effect with draft_choice='none'")
        if self.num_drafts == self.refinement_rounds == 1:
            idle = self.changed("draft_ties", "selection_reward", "reward_max")
            idle += ["draft_choice"] if self.draft_choice in ("random", "worst") else []
            if idle:
                raise ValueError(f"{', '.join(idle)} would have no effect with one draft")
        limits = self.changed("max_draft_length", "max_spliced_prompt_length")
        if self.changed("draft_keep") and not limits:
            raise ValueError(
                "draft_keep would have no effect: it needs max_draft_length or "
                "max_spliced_prompt_length"
            )
        of_rank = self.changed("selection_reward")
        of_rank += ["draft_ties"] if self.draft_ties == "shortest" else []
        if self.draft_choice == "random" and of_rank:
            raise ValueError(f"{', '.join(of_rank)} has no effect with draft_choice='random'")
        if self.draft_loss_coef > 0 and self.num_drafts < 2:
            raise ValueError("draft_loss_coef > 0 needs num_drafts >= 2 for the drafts' advantages")
        if self.draft_loss_coef > 0 and self.use_trl_loss:
            raise ValueError("draft_loss_coef > 0 needs use_trl_loss=False: TRL's has one stage")
        if self.draft_loss_coef > 0 and self.reward_max is not None:
            raise ValueError("draft_loss_coef > 0 needs reward_max=None: it cancels drafts")
        others = ", ".join(self.changed("draft_choice", "draft_ties", "selection_reward"))
        if self.reward_max is not None and others:
            raise ValueError(f"reward_max takes the first best draft: leave out {others}")
        if not self.use_trl_loss and self.use_adaptive_entropy:
            raise ValueError("use_adaptive_entropy=True needs use_trl_loss=True")
        self._check_eval()
        shows_drafts = self.num_drafts and self.draft_choice != "none"
        if self.use_vllm and shows_drafts and self.vllm_max_model_length is not None:
            self._check_model_length(self.vllm_max_model_length)

    def _check_draft_share(self) -> None:
        """Every rank draws a whole number of drafts; trained ones fill whole micro-batches."""
        rows, what = self.per_device_train_batch_size, "per_device_train_batch_size"
        if self.draft_loss_coef == 0:
            rows, what = rows * self.steps_per_generation, f"{what} * steps_per_generation"
        if rows * self.num_drafts % self.num_refinements:
            raise ValueError(
                f"{what} * num_drafts must be divisible by num_refinements, "
                f"got {rows} * {self.num_drafts} and {self.num_refinements}"
            )

    def _check_eval(self) -> None:
        group = self.num_generations_eval or self.num_refinements
        rows = self.per_device_eval_batch_size
        if self.eval_with_draft and rows * self.num_drafts % group:
            raise ValueError(
                "eval_with_draft needs per_device_eval_batch_size * num_drafts divisible by "
                f"num_generations_eval, got {rows} * {self.num_drafts} and {group}"
            )

    def _check_model_length(self, limit: int) -> None:
        if self.max_spliced_prompt_length is None or self.max_completion_length is None:
            raise ValueError(
                "vllm_max_model_length needs max_spliced_prompt_length and max_completion_length"
            )
        wanted = self.max_spliced_prompt_length + self.max_completion_length
        if wanted > limit:
            raise ValueError(
                f"max_spliced_prompt_length + max_completion_length = {wanted} exceeds "
                f"vllm_max_model_length = {limit}"
            )
