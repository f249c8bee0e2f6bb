"""TRL's loss options as values of `igrpo_kernels`, and its normalizers as their denominators."""

from dataclasses import replace
from itertools import chain

from torch import Tensor
from trl import GRPOConfig

from igrpo_kernels import (
    K3,
    Cispo,
    Clip,
    FixedLength,
    RatioWeighted,
    Sapo,
    SequenceClip,
    SequenceMean,
    TokenMean,
)
from igrpo_kernels.aggregates import Aggregate
from igrpo_kernels.checks import check_number
from igrpo_kernels.kl import KlEstimator
from igrpo_kernels.surrogates import Surrogate, Vespo

from .config import IGRPOConfig

CLIP_OPTIONS = ("epsilon", "epsilon_high", "delta", "importance_sampling_level")
READ_BY = {
    "cispo": ("epsilon_high",),
    "sapo": ("sapo_temperature_neg", "sapo_temperature_pos"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
}
"""The options of a surrogate, by `loss_type`; all other losses read `CLIP_OPTIONS`."""
ABOVE_ZERO = (*READ_BY["sapo"], "vespo_lambda_pos", "vespo_lambda_neg")
AT_LEAST_ZERO = ("epsilon", "epsilon_high", "vespo_k_pos", "vespo_k_neg")
SURROGATE_OPTIONS = tuple(dict.fromkeys(chain(CLIP_OPTIONS, *READ_BY.values())))

WAY_OUT = "; use_trl_loss=True trains with it as TRL does"


def surrogate_of(args: IGRPOConfig) -> Surrogate:
    """Turn `loss_type`, the clip bounds and `importance_sampling_level` into a surrogate.

    Raises:
        ValueError: A combination that has no such value.

    Examples:
        >>> surrogate_of(IGRPOConfig("out", epsilon_high=0.28, bf16=False, report_to="none"))
        Clip(low=0.2, high=0.28, dual=None)
    """
    low, high = args.epsilon, args.epsilon if args.epsilon_high is None else args.epsilon_high
    read = READ_BY.get(args.loss_type, CLIP_OPTIONS)
    idle = set(args.changed(*SURROGATE_OPTIONS)) - {*read}
    if idle:
        raise ValueError(
            f"{', '.join(sorted(idle))} would have no effect with loss_type={args.loss_type!r}"
            f"{WAY_OUT}"
        )
    for name in read:
        value = getattr(args, name)
        if name in ABOVE_ZERO:
            check_number(name, value, above=0)
        elif name in AT_LEAST_ZERO and value is not None:
            check_number(name, value, at_least=0)
    if args.loss_type == "cispo":
        if high < 1:
            raise ValueError(
                "loss_type='cispo' caps the ratio itself at epsilon_high, which must be at least 1 "
                f"(5.0, say), got {high}{WAY_OUT}"
            )
        return Cispo(max_ratio=high)
    if args.loss_type == "sapo":
        return Sapo(args.sapo_temperature_pos, args.sapo_temperature_neg)
    if args.loss_type == "vespo":
        return Vespo(
            args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg
        )
    if args.importance_sampling_level == "token":
        if args.delta is not None and args.delta < 1 + high:
            raise ValueError(
                f"delta must be at least 1 + epsilon_high = {1 + high}, got {args.delta}{WAY_OUT}"
            )
        return Clip(low, high, args.delta)
    if args.importance_sampling_level != "sequence":
        raise ValueError(
            "importance_sampling_level must be 'token' or 'sequence', "
            f"got {args.importance_sampling_level!r}"
        )
    if args.delta is not None:
        raise ValueError(f"delta needs importance_sampling_level='token'{WAY_OUT}")
    return SequenceClip(low, high)


def aggregate_of(args: GRPOConfig) -> Aggregate:
    """Turn `loss_type` into an aggregate, still without the step's denominator.

    Raises:
        ValueError: `loss_type` is none of TRL's.

    Examples:
        >>> aggregate_of(IGRPOConfig("out", loss_type="dapo", bf16=False, report_to="none"))
        TokenMean(denominator=None)
    """
    aggregates: dict[str, Aggregate] = {
        "grpo": SequenceMean(),
        "sapo": SequenceMean(),
        "bnpo": TokenMean(),
        "dapo": TokenMean(),
        "cispo": TokenMean(),
        "vespo": TokenMean(),
        "luspo": FixedLength(1),
    }
    if args.loss_type == "dr_grpo":
        return FixedLength(args.max_completion_length)
    if args.loss_type not in aggregates:
        raise ValueError(f"loss_type must be one that TRL has, got {args.loss_type!r}")
    return aggregates[args.loss_type]


def kl_of(args: GRPOConfig) -> KlEstimator:
    """Turn `use_bias_correction_kl` into k3, plain or times the ratio.

    Raises:
        ValueError: The ratio is the sequence's, which `RatioWeighted` does not know.
    """
    if not args.use_bias_correction_kl or args.beta == 0.0:
        return K3()
    if args.importance_sampling_level == "sequence":
        raise ValueError(
            f"use_bias_correction_kl=True needs importance_sampling_level='token'{WAY_OUT}"
        )
    return RatioWeighted(K3())


def check_loss(args: IGRPOConfig, surrogate: Surrogate | None, aggregate: Aggregate | None) -> None:
    """Refuse options that the loss would not honor.

    Args:
        args: The configuration.
        surrogate: What the trainer was given in place of the configuration's.
        aggregate: Likewise.

    Raises:
        ValueError: Two options exclude each other, or one would have no effect.
    """
    if args.use_trl_loss:
        if surrogate is not None or aggregate is not None:
            raise ValueError("surrogate and aggregate need use_trl_loss=False")
        return
    if surrogate is not None and (idle := args.changed(*SURROGATE_OPTIONS)):
        raise ValueError(f"{', '.join(idle)} would have no effect beside a surrogate")
    if args.changed("loss_type") and (surrogate is None) != (aggregate is None):
        raise ValueError(
            "loss_type and one of surrogate and aggregate are ambiguous: give both values, or none"
        )
    if args.changed("loss_type") and None not in (surrogate, aggregate):
        raise ValueError("loss_type would have no effect beside a surrogate and an aggregate")
    folds = (surrogate or surrogate_of(args)).folds_importance_weights
    if folds and (args.top_entropy_quantile < 1.0 or args.off_policy_mask_threshold is not None):
        raise ValueError(
            "top_entropy_quantile and off_policy_mask_threshold need a surrogate that is "
            f"multiplied by importance weights; this one folds them into its own{WAY_OUT}"
        )


def with_denominator(aggregate: Aggregate, *, sequences: float, tokens: Tensor) -> Aggregate:
    """Give an aggregate the count of the whole accumulation window, unless it brings its own.

    Args:
        aggregate: Any aggregate; `Sum` and those of other packages come back unchanged.
        sequences: Sequences times accumulation steps, for `SequenceMean` and `FixedLength`.
        tokens: Tokens of one accumulation window on one rank, for `TokenMean`. A 0-d tensor.

    Returns:
        The aggregate.

    Examples:
        >>> import torch
        >>> with_denominator(SequenceMean(), sequences=8, tokens=torch.tensor(100.0))
        SequenceMean(denominator=8)
    """
    if isinstance(aggregate, SequenceMean | FixedLength) and aggregate.denominator is None:
        return replace(aggregate, denominator=sequences)
    if isinstance(aggregate, TokenMean) and aggregate.denominator is None:
        return replace(aggregate, denominator=tokens)
    return aggregate
