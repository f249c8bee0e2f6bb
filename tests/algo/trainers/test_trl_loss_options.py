"""From TRL's loss options to values and denominators, and which are refused."""

from typing import Any

import pytest
import torch
from tiny_qwen import third_party

from igrpo_algo.trainers.trl import IGRPOConfig
from igrpo_algo.trainers.trl.loss_options import (
    aggregate_of,
    check_loss,
    kl_of,
    surrogate_of,
    with_denominator,
)
from igrpo_kernels import (
    K3,
    Cispo,
    Clip,
    FixedLength,
    RatioWeighted,
    Sapo,
    SequenceClip,
    SequenceMean,
    Sum,
    TokenMean,
)
from igrpo_kernels.surrogates import Vespo

pytestmark = third_party


def make(**options: Any) -> IGRPOConfig:
    return IGRPOConfig("out", bf16=False, report_to="none", **options)


@pytest.mark.parametrize(
    ("options", "surrogate", "aggregate"),
    [
        ({}, Clip(0.2, 0.2), SequenceMean()),
        ({"epsilon_high": 0.28, "delta": 3.0}, Clip(0.2, 0.28, 3.0), SequenceMean()),
        ({"loss_type": "dapo", "epsilon": 0.1}, Clip(0.1, 0.1), TokenMean()),
        ({"loss_type": "bnpo"}, Clip(), TokenMean()),
        ({"loss_type": "dr_grpo", "max_completion_length": 9}, Clip(), FixedLength(9)),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, Cispo(max_ratio=5.0), TokenMean()),
        ({"loss_type": "sapo", "sapo_temperature_neg": 2.0}, Sapo(1.0, 2.0), SequenceMean()),
        ({"loss_type": "vespo", "vespo_k_neg": 4.0}, Vespo(k_negative=4.0), TokenMean()),
        (
            {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 2e-3},
            SequenceClip(2e-3, 2e-3),
            FixedLength(1),
        ),
    ],
)
def test_values_of_the_options(options: dict[str, Any], surrogate: Any, aggregate: Any) -> None:
    args = make(**options)
    assert surrogate_of(args) == surrogate
    assert aggregate_of(args) == aggregate


def test_kl_of_the_options() -> None:
    assert kl_of(make(beta=0.1)) == K3()
    assert kl_of(make(beta=0.1, use_bias_correction_kl=True)) == RatioWeighted(K3())
    assert kl_of(make(use_bias_correction_kl=True)) == K3()
    with pytest.raises(ValueError, match=r"level=.token.*use_trl_loss=True"):
        kl_of(make(beta=0.1, use_bias_correction_kl=True, importance_sampling_level="sequence"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "cispo"}, "epsilon_high, which must be at least 1"),
        ({"loss_type": "cispo", "epsilon_high": 5.0, "delta": 6.0}, "delta would have no effect"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "importance_sampling_le"),
        ({"loss_type": "vespo", "epsilon": 0.1, "sapo_temperature_neg": 2.0}, "epsilon, sapo_t"),
        ({"vespo_k_pos": 1.0}, "vespo_k_pos would have no effect with loss_type='grpo'"),
        ({"delta": 2.0, "importance_sampling_level": "sequence"}, "delta needs"),
        ({"delta": 1.1}, r"delta must be at least 1 \+ epsilon_high = 1\.2, got 1\.1"),
    ],
)
def test_options_without_a_value_are_refused_with_the_way_out(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{message}.*use_trl_loss=True"):
        check_loss(make(**options), None, None)
    assert check_loss(make(use_trl_loss=True, **options), None, None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": -1.0}, "epsilon must be >= 0, got -1"),
        ({"epsilon_high": -0.1}, "epsilon_high must be >= 0, got -0.1"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be > 0"),
        ({"loss_type": "vespo", "vespo_k_pos": -1.0}, "vespo_k_pos must be >= 0"),
        ({"loss_type": "vespo", "vespo_lambda_neg": 0.0}, "vespo_lambda_neg must be > 0"),
    ],
)
def test_a_value_out_of_range_is_named_as_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_loss(make(**options), None, None)


def test_an_unknown_loss_or_level_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 'token' or 'sequence', got 'Sequence'"):
        surrogate_of(make(importance_sampling_level="Sequence"))
    with pytest.raises(ValueError, match="loss_type must be one that TRL has, got 'ppo'"):
        aggregate_of(make(loss_type="ppo"))


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        ({"use_trl_loss": True}, (Clip(), None), "need use_trl_loss=False"),
        ({"use_trl_loss": True}, (None, Sum()), "need use_trl_loss=False"),
        ({"epsilon": 0.1}, (Clip(), None), "epsilon would have no effect"),
        ({"delta": 2.0, "vespo_k_pos": 1.0}, (Sapo(), None), "delta, vespo_k_pos would have no"),
        ({"loss_type": "dapo"}, (Clip(), None), "give both values, or none"),
        ({"loss_type": "dapo"}, (None, Sum()), "give both values, or none"),
        ({"loss_type": "dapo"}, (Clip(), Sum()), "loss_type would have no effect"),
        ({"top_entropy_quantile": 0.5}, (Vespo(), None), "folds them into its own"),
        ({"off_policy_mask_threshold": 0.5, "loss_type": "vespo"}, (None, None), "folds them"),
    ],
)
def test_options_that_would_not_be_honored_are_refused_trl_6808_trl_5595(
    options: dict[str, Any], values: tuple[Any, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_loss(make(**options), *values)


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({}, (Sapo(), None)),
        ({"epsilon": 0.1}, (None, Sum())),
        ({}, (Vespo(), TokenMean())),
        ({"top_entropy_quantile": 0.5}, (Clip(), None)),
        ({"use_trl_loss": True, "loss_type": "vespo", "top_entropy_quantile": 0.5}, (None, None)),
    ],
)
def test_options_that_are_honored_pass(options: dict[str, Any], values: tuple[Any, Any]) -> None:
    assert check_loss(make(**options), *values) is None


def test_denominators_of_the_window() -> None:
    tokens = torch.tensor(50.0)
    assert with_denominator(SequenceMean(), sequences=8, tokens=tokens) == SequenceMean(8)
    assert with_denominator(FixedLength(7), sequences=8, tokens=tokens) == FixedLength(7, 8)
    assert with_denominator(TokenMean(), sequences=8, tokens=tokens) == TokenMean(tokens)
    for own in (SequenceMean(3), FixedLength(7, 3), TokenMean(3), Sum(), Sum(3)):
        assert with_denominator(own, sequences=8, tokens=tokens) == own
