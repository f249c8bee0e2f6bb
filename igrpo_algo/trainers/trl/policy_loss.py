"""`GRPOTrainer` with the loss of `igrpo_kernels`: any surrogate, any aggregate, either stage."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from igrpo_kernels import linear_policy_loss, linear_token_logprobs
from igrpo_kernels.aggregates import Aggregate
from igrpo_kernels.kl import KlEstimator
from igrpo_kernels.loss_from_logprobs import policy_loss
from igrpo_kernels.sequences import Sequences
from igrpo_kernels.surrogates import Surrogate

from ..given_weights import GivenWeights
from .bookkeeping import ExactBookkeeping
from .config import IGRPOConfig
from .hidden_states import Head, HeadInput, add_head_argument
from .loss_metrics import LossMetrics, loss_metrics
from .loss_options import aggregate_of, check_loss, kl_of, surrogate_of, with_denominator
from .loss_rows import LossRows


class Computed(NamedTuple):
    """The loss of a micro-batch, and the rows that it was computed from.

    Attributes:
        loss: A scalar on the graph.
        rows: The rows, which may be fewer than those of the micro-batch.
        logprobs: Their log-probs. Shape [B, T].
        entropy: Their entropy. Shape [B, T].
        aux_loss: Load-balancing loss of a mixture of experts, or None.
    """

    loss: Tensor
    rows: LossRows
    logprobs: Tensor
    entropy: Tensor
    aux_loss: Tensor | None


class PolicyLossTrainer(ExactBookkeeping):
    """TRL's trainer, its `_compute_loss` stated in `igrpo_kernels`.

    loss = refinements + draft_loss_coef * drafts

    Each is averaged over its own rows, refinements over those of all rounds: sequences and tokens
    are counted over one accumulation window, as TRL does, so micro-batches add up. Equal to TRL's
    loss in value and gradient for each `loss_type`. The loss is taken from the hidden states in one
    pass (`linear_policy_loss`), inside the wrapped model's forward; where it needs the log-probs of
    the whole micro-batch first (`top_entropy_quantile`, `off_policy_mask_threshold`,
    `entropy_coef`), in two. In one pass, completions of zero advantage are left out of forward and
    backward, unless KL or a mixture of experts wants them (`args.skip_zero_advantages`).

    Args:
        args: The configuration.
        surrogate: Loss of a token, in place of what `args.loss_type` says.
        aggregate: How tokens are averaged, likewise.
        **kwargs: Any other argument of TRL's `GRPOTrainer`.

    Raises:
        ValueError: Options that the loss would not honor, or an adapter on the model's head.
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
        for model in (self.model, self.ref_model):
            if model is not None:
                _prepare_head(self.accelerator.unwrap_model(model), args)

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **of_images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Score completions as TRL does, with `linear_token_logprobs` on the hidden states."""
        if torch.is_grad_enabled() and is_deepspeed_zero3_enabled():
            # Our op's backward reads the head's weight, which ZeRO-3 has taken away by then.
            result: tuple[Any, ...] = super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **of_images,
            )
            return result

        def score(ids: Tensor, mask: Tensor, given: HeadInput) -> dict[str, Tensor | None]:
            op = partial(
                linear_token_logprobs,
                given.hidden[:, -logits_to_keep - 1 : -1],
                given.weight,
                ids[:, -logits_to_keep:],
                mask=mask[:, -logits_to_keep:],
                temperature=self.temperature,
                **given.options(),
            )
            logprobs, entropy = op(return_entropy=True) if compute_entropy else (op(), None)
            return {"logprobs": logprobs, "entropy": entropy, "aux_loss": given.aux_loss}

        size = batch_size or len(input_ids)
        parts = [
            self._run(model, ids, mask, partial(score, ids, mask), aux_loss=compute_aux_loss)
            for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True)
        ]
        columns = {name: [part[name] for part in parts] for name in parts[0]}
        return (
            torch.cat(columns["logprobs"]),
            torch.cat(columns["entropy"]) if compute_entropy else None,
            torch.stack(columns["aux_loss"]).mean() if compute_aux_loss else None,
        )

    def _run(
        self, model: nn.Module, ids: Tensor, mask: Tensor, head: Head, *, aux_loss: bool
    ) -> dict[str, Any]:
        experts = {"output_router_logits": True} if aux_loss else {}
        with self.accelerator.autocast():
            out: dict[str, Any] = model(input_ids=ids, attention_mask=mask, head=head, **experts)
        return out

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.args.use_trl_loss:
            return super()._compute_loss(model, inputs)
        rows = LossRows.of(inputs, self._token_weights(inputs))
        if self._takes_two_passes:
            computed = self._in_two_passes(model, rows)
        else:
            computed = self._in_one_pass(model, rows.that_teach() if self._skips else rows)
        loss = computed.loss
        if computed.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * computed.aux_loss / self._accumulation
            balance = self.accelerator.gather_for_metrics(computed.aux_loss.detach())
            self._append("aux_loss", balance.mean())
        self._log_loss(rows, computed)
        return loss

    @property
    def _takes_two_passes(self) -> bool:
        return bool(
            self.top_entropy_quantile < 1.0
            or self.off_policy_mask_threshold is not None
            or self.entropy_coef != 0.0
        )

    @property
    def _skips(self) -> bool:
        """Whether completions of zero advantage are left out."""
        return bool(
            self.args.skip_zero_advantages
            and self.model.training
            and self.surrogate.scope != "batch"
            and self.beta == 0.0
            and not self.aux_loss_enabled
            and not self._takes_two_passes
        )

    def _in_one_pass(self, model: nn.Module, rows: LossRows) -> Computed:
        width = rows.mask.shape[1]

        def head(given: HeadInput) -> dict[str, Tensor | None]:
            out = linear_policy_loss(
                given.hidden[:, -width - 1 : -1],
                given.weight,
                rows.completion_ids,
                rows.advantages,
                rows.mask,
                importance_weights=rows.importance_weights,
                temperature=self.temperature,
                return_entropy=True,
                all_metrics=True,  # else 0 for tokens that teach nothing, in what is logged below
                **given.options(),
                **self._terms(rows),
            )
            scores = {"logprobs": out.logprobs, "entropy": out.entropy}
            return {"loss": out.loss, "aux_loss": given.aux_loss, **scores}

        out = self._run(
            model, rows.input_ids, rows.attention_mask, head, aux_loss=self.aux_loss_enabled
        )
        return Computed(rows=rows, **out)

    def _in_two_passes(self, model: nn.Module, rows: LossRows) -> Computed:
        logprobs, entropy, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            rows.input_ids,
            rows.attention_mask,
            rows.mask.shape[1],
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
        )
        assert entropy is not None
        weights, forks = rows.importance_weights, None
        if self.top_entropy_quantile < 1.0:
            forks = self.get_high_entropy_mask(entropy, rows.mask, 1 - self.top_entropy_quantile)
        factors = [forks, self._off_policy_mask(rows, logprobs)]
        for factor in factors:  # masks on the surrogate alone, which leave denominators as they are
            if factor is not None:
                ones = torch.ones_like(logprobs) if weights is None else weights
                weights = ones.detach() * factor
        loss = policy_loss(
            logprobs, rows.advantages, rows.mask, importance_weights=weights, **self._terms(rows)
        ).loss
        if self.entropy_coef != 0.0:
            self._log_policy_loss(loss.detach())
            chosen = (rows.mask if forks is None else rows.mask * forks) != 0
            bonus = torch.where(chosen, entropy, 0.0).sum() / chosen.sum().clamp(min=1)
            loss = loss - self.entropy_coef * bonus / self._accumulation
        return Computed(loss, rows, logprobs.detach(), entropy.detach(), aux_loss)

    def _terms(self, rows: LossRows) -> dict[str, Any]:
        return {
            "surrogate": self.surrogate,
            "aggregate": GivenWeights(rows.weights),
            "old_logprobs": rows.old_logprobs,
            "ref_logprobs": rows.ref_logprobs,
            "kl_coef": self.beta,
            "kl": self.kl,
        }

    def _off_policy_mask(self, rows: LossRows, logprobs: Tensor) -> Tensor | None:
        if self.off_policy_mask_threshold is None:
            return None
        old = logprobs.detach() if rows.old_logprobs is None else rows.old_logprobs
        sampler = old if rows.sampler_logprobs is None else rows.sampler_logprobs
        mask: Tensor = self.get_off_policy_mask(
            rows.advantages[:, None], logprobs, sampler, rows.mask, self.off_policy_mask_threshold
        )
        return mask

    @property
    def _accumulation(self) -> int:
        return self.current_gradient_accumulation_steps if self.model.training else 1

    def _token_weights(self, inputs: Mapping[str, Any]) -> Tensor:
        """Weigh each token by its stage's aggregate over the accumulation window. [B, T]."""
        mask, sequences = inputs["completion_mask"], len(inputs["completion_mask"])
        if "is_draft" not in inputs:
            return self._weights_of(mask, sequences, inputs["num_items_in_batch"])
        args, is_draft = self.args, inputs["is_draft"][:, None]
        size = args.per_device_train_batch_size  # on average: rows of all stages are shuffled
        refinements = self._weights_of(
            mask * ~is_draft, size * args.refinement_rounds, inputs["num_items_in_batch"]
        )
        size = size * args.num_drafts // args.num_refinements
        drafts = self._weights_of(mask * is_draft, size, inputs["num_draft_items_in_batch"])
        return torch.where(is_draft, args.draft_loss_coef * drafts, refinements)

    def _weights_of(self, mask: Tensor, sequences: int, generated: Tensor) -> Tensor:
        """Let the aggregate weigh tokens, given the counts of one accumulation window on this rank.

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
        aggregate = with_denominator(
            self.aggregate, sequences=sequences * self._accumulation, tokens=tokens
        )
        return aggregate.weights(Sequences.of(mask, mask), torch.float32)

    def _log_policy_loss(self, loss: Tensor) -> None:
        """Log the loss before the entropy bonus, and the bonus' weight, as TRL does."""
        if self.loss_type not in ("cispo", "dapo", "vespo"):
            loss = loss * self._accumulation  # TRL logs these before it divides
        self._append("policy_loss", self.accelerator.gather(loss).nanmean())
        if self.model.training and self.accelerator.sync_gradients:
            self._append("entropy_coef", self.entropy_coef)

    def _log_loss(self, rows: LossRows, computed: Computed) -> None:
        """Log means over the tokens of all ranks, and the extremes over their sequences."""
        mine = ~computed.rows.is_draft
        if self._skips:  # where nothing teaches, one row is computed that is not to be measured
            mine &= computed.rows.advantages != 0
        part: LossMetrics = loss_metrics(
            computed.rows.take(mine),
            rows.take(~rows.is_draft),
            computed.logprobs[mine],
            computed.entropy[mine],
            surrogate=self.surrogate,
            kl=self.kl,
            skipping=self._skips,
        )
        shares = torch.stack([torch.stack([s.total, s.size]) for s in part.means.values()])
        for name, (total, size) in zip(part.means, self.accelerator.reduce(shares), strict=True):
            self._append(name, total / size)  # NaN without a token, which TRL leaves out
        for name, values in part.lowest.items():
            self._append(name, self._extreme(-values).neg())
        for name, values in part.highest.items():
            self._append(name, self._extreme(values))

    def _extreme(self, values: Tensor) -> Tensor:
        """Find the greatest value over all ranks that is not a number but NaN; NaN without any."""
        known = values[~values.isnan()]
        own = known.max() if len(known) else values.new_tensor(-torch.inf)
        greatest = self.accelerator.gather(own).max()
        return torch.where(greatest.isinf(), torch.nan, greatest)

    def _append(self, name: str, value: Tensor | float) -> None:
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(float(value))


def _prepare_head(model: Any, args: IGRPOConfig) -> None:
    """Give a model's forward the argument `head`, unless the head could not be honored."""
    if is_peft_model(model):
        from peft.tuners.tuners_utils import BaseTunerLayer

        if isinstance(model.get_output_embeddings(), BaseTunerLayer):
            raise ValueError(
                "an adapter on lm_head can't be trained: log-probs come from lm_head.weight, "
                "which the adapter leaves as it is; take lm_head out of target_modules"
            )
        model = model.get_base_model()
    add_head_argument(model, in_float32=args.cast_lm_head_to_fp32)
