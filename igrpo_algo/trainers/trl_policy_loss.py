"""`GRPOTrainer` with the loss of `igrpo_kernels`: any surrogate, any aggregate, either stage."""

from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from igrpo_kernels import PolicyLoss, policy_loss
from igrpo_kernels.aggregates import Aggregate
from igrpo_kernels.kl import KlEstimator
from igrpo_kernels.surrogates import Surrogate

from .trl_config import IGRPOConfig
from .trl_head import choose_head
from .trl_loss import aggregate_of, check_loss, kl_of, surrogate_of, with_denominator

METRIC_NAMES = {
    "entropy": "entropy",
    "kl": "kl",
    "ratio": "ratio",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
}


class PolicyLossTrainer(GRPOTrainer):
    """TRL's trainer, its `_compute_loss` stated in `igrpo_kernels`.

    loss = refinements + draft_loss_coef * drafts

    Each stage is averaged over its own rows: sequences and tokens are counted over one accumulation
    window, as TRL does, so micro-batches add up. Equal to TRL's loss in value and gradient for each
    `loss_type`. Log-probs come from TRL's fused head, inside the wrapped model's forward; the op
    in it is ours or TRL's (`args.fused_head`).

    Args:
        args: The configuration.
        surrogate: Loss of a token, in the place of what `args.loss_type` says.
        aggregate: How tokens are averaged, likewise.
        **kwargs: Any other argument of `GRPOTrainer`.

    Raises:
        ValueError: Options that the loss would not honor.
    """

    surrogate: Surrogate
    aggregate: Aggregate
    kl: KlEstimator

    def __init__(
        self,
        *,
        args: IGRPOConfig,
        surrogate: Surrogate | None = None,
        aggregate: Aggregate | None = None,
        **kwargs: Any,
    ):
        check_loss(args, surrogate, aggregate)
        if not args.use_trl_loss:
            self.surrogate = surrogate or surrogate_of(args)
            self.aggregate = aggregate or aggregate_of(args)
            self.kl = kl_of(args)
        super().__init__(args=args, **kwargs)
        head = self.model.get_output_embeddings()
        self._scoring_head = choose_head(args.fused_head, head, self.accelerator.device)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        with self._scoring_head():
            result: tuple[Any, ...] = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return result

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.args.use_trl_loss:
            return super()._compute_loss(model, inputs)
        mask, advantages = inputs["completion_mask"], inputs["advantages"]
        logprobs, entropy, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            mask.shape[1],
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
        )
        forks = None
        if self.top_entropy_quantile < 1.0:
            forks = self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
        weights = self._importance_weights(inputs, logprobs, forks)
        is_draft = inputs.get("is_draft", torch.zeros_like(advantages, dtype=torch.bool))

        def stage(rows: Tensor, sequences: int, generated: Tensor) -> PolicyLoss:
            counted = mask * rows[:, None]
            return policy_loss(
                logprobs,
                advantages,
                counted,
                surrogate=self.surrogate,
                aggregate=self._aggregate_over(counted, sequences, generated),
                old_logprobs=inputs.get("old_per_token_logps"),
                ref_logprobs=inputs.get("ref_per_token_logps"),
                kl_coef=self.beta,
                kl=self.kl,
                importance_weights=weights,
                entropy=entropy.detach(),
            )

        args, sequences = self.args, len(advantages)
        if "is_draft" in inputs:
            sequences = args.per_device_train_batch_size
        refinements = stage(~is_draft, sequences, inputs["num_items_in_batch"])
        loss = refinements.loss
        if "is_draft" in inputs:
            sequences = sequences * args.num_drafts // args.num_refinements
            drafts = stage(is_draft, sequences, inputs["num_draft_items_in_batch"])
            loss = loss + args.draft_loss_coef * drafts.loss
        if self.entropy_coef != 0.0:
            chosen = (mask if forks is None else mask * forks) != 0
            bonus = torch.where(chosen, entropy, 0.0).sum() / chosen.sum().clamp(min=1)
            loss = loss - self.entropy_coef * bonus / self._accumulation
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / self._accumulation
        self._log_loss(refinements.metrics, (mask * ~is_draft[:, None]).sum())
        return loss

    @property
    def _accumulation(self) -> int:
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _aggregate_over(self, mask: Tensor, sequences: int, generated: Tensor) -> Aggregate:
        """Give the aggregate the counts of one accumulation window on this rank.

        Args:
            mask: The counted tokens of this micro-batch. Shape [B, T].
            sequences: Its sequences; with drafts among the rows, those of an average micro-batch.
            generated: Tokens of the whole generation batch, over all ranks.
        """
        tokens = generated.clamp(min=1) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self._accumulation / self.args.steps_per_generation
        if self.args.loss_type == "bnpo":
            tokens = mask.sum() * self._accumulation
        return with_denominator(
            self.aggregate, sequences=sequences * self._accumulation, tokens=tokens
        )

    def _importance_weights(
        self, inputs: dict[str, Any], logprobs: Tensor, forks: Tensor | None
    ) -> Tensor | None:
        """Multiply what acts on the surrogate alone: vLLM's correction and TRL's two masks."""
        mask, advantages = inputs["completion_mask"], inputs["advantages"][:, None]
        factors = []
        if self.use_vllm and self.vllm_importance_sampling_correction:
            factors.append(inputs["importance_sampling_ratio"])
        if self.off_policy_mask_threshold is not None:
            old = inputs.get("old_per_token_logps", logprobs.detach())
            sampler = inputs.get("sampling_per_token_logps", old)
            factors.append(
                self.get_off_policy_mask(
                    advantages, logprobs, sampler, mask, self.off_policy_mask_threshold
                )
            )
        if forks is not None:
            factors.append(forks)
        if not factors:
            return None
        weights = torch.ones_like(logprobs)
        for factor in factors:
            weights = weights * factor
        return weights

    def _log_loss(self, metrics: dict[str, Tensor], tokens: Tensor) -> None:
        """Log token means over all ranks, under TRL's names where it has them."""
        known = [name for name in METRIC_NAMES if name in metrics]
        sums = torch.stack([metrics[name] * tokens for name in known] + [tokens.float()])
        *sums, count = self.accelerator.reduce(sums).tolist()
        mode = "train" if self.model.training else "eval"
        for name, total in zip(known, sums, strict=True):
            self._metrics[mode][METRIC_NAMES[name]].append(total / max(count, 1))
