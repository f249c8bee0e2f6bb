"""iGRPO in NeMo-RL 0.6, which has no plugins: two lines before its own examples/run_grpo.py runs.

    use_igrpo(num_drafts=4, max_prompt_tokens=2048)
    nemo_rl.algorithms.grpo.ClippedPGLossFn = lambda _, **options: IGRPOLossFn(**options)

`use_igrpo` wraps the two rollout functions that `grpo_train` calls; the second line is for a loss
of ours in the place of NeMo-RL's, which `grpo_train` takes as `loss_fn`. G is
`grpo.num_generations_per_prompt`. A batch in which every prompt stands once, as in validation, is
single-shot. NeMo-Gym and the trainers that roll out elsewhere (`grpo.async_grpo.enabled`,
`data_plane.enabled`) are refused by NeMo-RL's `setup`.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import wraps
from itertools import count, groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from igrpo_kernels import K3, Clip, SequenceMean, TokenMean
from igrpo_kernels.checks import check_count
from igrpo_kernels.kl import KlEstimator, ScoreWeighted
from igrpo_kernels.surrogates import Surrogate

from .. import policy_loss
from ..drafts.rules import DraftRules
from ..losses.corrections import token_importance_weights, truncate_weights
from ..rollouts.completions import Completion
from ..rollouts.once_per_group import check_rules, fit_to_tokenizer
from ..seeds import derive_seed
from .refusals import refuse_on
from .versions import requires

with requires("nemo-rl", "0.6", "0.6", install="clone github.com/NVIDIA-NeMo/RL and `uv sync`"):
    import nemo_rl.algorithms.grpo
    from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType

ROLLOUTS = ("run_multi_turn_rollout", "run_async_multi_turn_rollout")


def use_igrpo(
    *,
    rules: DraftRules = DraftRules(),  # frozen
    num_drafts: int = 4,
    max_prompt_tokens: int,
    seed: int = 0,
) -> None:
    """Make `grpo_train` draw both stages from here on, in this process.

    NeMo-RL's data processors apply the chat template to a prompt before anyone can see it. A draft
    goes before what the template puts after the user's message. Environments are given the
    messages as the model saw them, the draft included.

    Args:
        rules: How a draft is chosen and spliced.
        num_drafts: N.
        max_prompt_tokens: Maximum tokens of a spliced prompt: what `max_total_sequence_length`
            leaves beside an answer. The draft is cut to fit, the question never is.
        seed: For random ties, random drafts and dropout.

    Raises:
        TypeError: `rules` is not `DraftRules`, or a count not an int.
        ValueError: A count is below 1, the rules leave prompts out of Stage 2, or they have a
            selection score.
    """
    check_count("max_prompt_tokens", max_prompt_tokens)
    check_count("num_drafts", num_drafts)
    check_count("seed", seed, at_least=0)
    check_rules(rules, by_reward_alone=True)
    for name in ROLLOUTS:
        run = getattr(nemo_rl.algorithms.grpo, name)
        run = run.run if isinstance(run, _TwoStages) else run  # a second call replaces the first
        stages = _TwoStages(run, num_drafts, rules, max_prompt_tokens, seed)
        setattr(nemo_rl.algorithms.grpo, name, stages)
    setup = nemo_rl.algorithms.grpo.setup

    @wraps(setup)
    def checked(master_config: Any, *args: Any, **options: Any) -> Any:
        _check_config(master_config)
        return setup(master_config, *args, **options)

    nemo_rl.algorithms.grpo.setup = checked


def _check_config(config: Any) -> None:
    """Refuse what rolls out by other functions, and so without drafts."""
    elsewhere = {
        "grpo.async_grpo.enabled": getattr(config.grpo.async_grpo, "enabled", False),
        "data_plane.enabled": (config.data_plane or {}).get("enabled"),
        "env.should_use_nemo_gym": config.env.get("should_use_nemo_gym"),
    }
    for name, is_on in elsewhere.items():
        refuse_on(name, is_on, "its rollouts would have no drafts")


@dataclass(frozen=True)
class _TwoStages:
    """One of NeMo-RL's rollout functions, run for each stage."""

    run: Callable[..., tuple[Any, dict[str, Any]]]
    num_drafts: int
    rules: DraftRules
    max_prompt_tokens: int
    seed: int
    step: Iterator[int] = field(default_factory=count)

    def __call__(
        self, policy_generation: Any, input_batch: Any, tokenizer: Any, *args: Any, **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        def roll_out(batch: Any) -> tuple[Any, dict[str, Any]]:
            return self.run(policy_generation, batch, tokenizer, *args, **options)

        rows = range(len(input_batch["message_log"]))
        groups = [list(group) for _, group in groupby(rows, lambda i: int(input_batch["idx"][i]))]
        if all(len(group) == 1 for group in groups):
            return roll_out(input_batch)
        firsts = [group[0] for group in groups]
        questions = [_Question.of(input_batch["message_log"][row], tokenizer) for row in firsts]
        drafts, _ = roll_out(_copy_rows(input_batch, np.repeat(firsts, self.num_drafts).tolist()))
        shown = self._shown(questions, drafts, tokenizer)
        refined, metrics = roll_out(_show(input_batch, groups, shown, tokenizer))
        metrics["igrpo_draft_reward"] = drafts["total_reward"].float().mean().item()
        metrics["igrpo_conditioned"] = sum(map(bool, shown)) / len(shown)
        return refined, metrics

    def _shown(self, questions: list["_Question"], drafts: Any, tokenizer: Any) -> list[str]:
        """Return the Stage-2 prompt of each group, empty where it stays plain."""
        answers = list(map(_last_answer, drafts["message_log"]))
        rewards = drafts["total_reward"].view(-1, self.num_drafts).float().cpu()
        step = next(self.step)
        choices = self.rules.choose(
            rewards,
            lengths=torch.tensor(list(map(len, answers))).view(rewards.shape),
            seeds=[derive_seed(self.seed, step, group) for group in range(len(questions))],
        )
        shown = []
        for group, question in enumerate(questions):
            if choices.plain[group]:
                shown.append("")
                continue
            ids = answers[group * self.num_drafts + int(choices.index[group])]
            room = max(1, self.max_prompt_tokens - len(_encode(question.end, tokenizer)))
            rules = fit_to_tokenizer(self.rules, tokenizer, room)
            spliced = rules.condition(question.text, Completion.decoded(ids, tokenizer))
            shown.append(f"{spliced.prompt}{question.end}" if spliced.draft else "")
        return shown


class _Question(NamedTuple):
    """A prompt to which the chat template was applied, cut where the user's message ends."""

    text: str
    end: str

    @classmethod
    def of(cls, message_log: list[dict[str, Any]], tokenizer: Any) -> "_Question":
        mark = "?"
        chat = [{"role": "user", "content": mark}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        end = rendered.rpartition(mark)[2]
        content = message_log[-1]["content"]
        if not isinstance(content, str):
            raise ValueError("message_log must be text: images can't be combined with drafts here")
        if message_log[-1]["role"] != "user" or not content.endswith(end):
            raise ValueError(
                f"message_log must end with a user message to which the chat template was applied "
                f"(and so with {end!r}), got {content[-60:]!r}: there is no other place for a draft"
            )
        return cls(content.removesuffix(end), end)


def _encode(text: str, tokenizer: Any) -> list[int]:
    """Encode a templated prompt as NeMo-RL's data processors do."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _last_answer(message_log: list[dict[str, Any]]) -> list[int]:
    answers = (each for each in reversed(message_log) if each["role"] == "assistant")
    return next(answers)["token_ids"].tolist()


def _copy_rows(batch: Any, rows: list[int]) -> Any:
    """Copy rows of a batch, with logs of their own: rollouts append to them in place."""
    copied = batch.select_indices(rows)
    for name in ("message_log", "extra_env_info"):
        copied[name] = [deepcopy(value) for value in copied[name]]
    return copied


def _show(batch: Any, groups: list[list[int]], shown: list[str], tokenizer: Any) -> Any:
    """Put the Stage-2 prompts into a copy of the batch."""
    copied = _copy_rows(batch, [row for group in groups for row in group])
    for group, prompt in zip(groups, shown, strict=True):
        for row in group if prompt else []:
            log = copied["message_log"][row]
            ids = torch.tensor(_encode(prompt, tokenizer))
            log[-1] = {**log[-1], "content": prompt, "token_ids": ids}
            copied["length"][row] = sum(len(message["token_ids"]) for message in log)
    return copied


class IGRPOLossFn:
    """`igrpo_algo.policy_loss` as a loss function of NeMo-RL, by default the paper's equation 5.

    Args:
        surrogate: Any surrogate of `igrpo_kernels`.
        token_level: Average over the tokens of the step; the paper averages sequences.
        kl_coef: Weight of the KL term; `reference_policy_kl_penalty` must be above 0 in the
            configuration, or NeMo-RL computes no reference.
        kl: The estimator; NeMo-RL's own weighting is the default.
        max_importance_weight: Corrects for the engine that sampled, by weights up to this; None
            leaves the correction out.
        use_fused_linear_logprobs: Whether the model returns log-probs, as in NeMo-RL's
            configuration.
    """

    input_type = LossInputType.LOGPROB

    def __init__(
        self,
        surrogate: Surrogate = Clip(),
        *,
        token_level: bool = False,
        kl_coef: float = 0.0,
        kl: KlEstimator = ScoreWeighted(K3()),  # frozen
        max_importance_weight: float | None = None,
        use_fused_linear_logprobs: bool = False,
    ) -> None:
        self.loss_type = LossType.TOKEN_LEVEL if token_level else LossType.SEQUENCE_LEVEL
        self.surrogate = surrogate
        self.kl_coef = kl_coef
        self.kl = kl
        self.max_importance_weight = max_importance_weight
        self.use_fused_linear_logprobs = use_fused_linear_logprobs

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of a micro-batch.

        Args:
            next_token_logprobs: Shape [B, T - 1].
            data: NeMo-RL's batch; its tensors have shape [B, T].
            global_valid_seqs: Sequences of the step, over all micro-batches and ranks.
            global_valid_toks: Its tokens.

        Returns:
            The loss, and metrics that add up to means over the step.
        """
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
        old = data["prev_logprobs"][:, 1:]
        weights = None
        if self.max_importance_weight is not None:
            weights = token_importance_weights(old, data["generation_logprobs"][:, 1:], mask)
            weights = truncate_weights(weights, high=self.max_importance_weight)
        by_token = self.loss_type is LossType.TOKEN_LEVEL
        result = policy_loss(
            next_token_logprobs,
            data["advantages"][:, 1:],
            mask,
            surrogate=self.surrogate,
            aggregate=TokenMean(global_valid_toks) if by_token else SequenceMean(global_valid_seqs),
            old_logprobs=old,
            ref_logprobs=data["reference_policy_logprobs"][:, 1:] if self.kl_coef else None,
            kl_coef=self.kl_coef,
            kl=self.kl,
            importance_weights=weights,
        )
        share = mask.sum() / global_valid_toks.clamp(min=1)
        metrics = {name: (value * share).item() for name, value in result.metrics.items()}
        metrics["loss"] = result.loss.item()
        metrics["num_valid_samples"] = data["sample_mask"].sum().item()
        return result.loss, metrics
