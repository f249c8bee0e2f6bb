"""Bad input to the losses: the error names the argument, what was wanted and what came."""

import pytest
import torch

from igrpo_kernels import (
    K3,
    Cispo,
    Clip,
    FixedLength,
    Sapo,
    SequenceClip,
    SequenceMean,
    Sum,
    TokenMean,
    clipped_policy_loss,
    linear_policy_loss,
)
from igrpo_kernels.loss_from_logprobs import policy_loss
from igrpo_kernels.surrogates import ClipCov, DppoTv, Gmpo, KlCov, Vespo

LOGPROBS = torch.zeros(2, 3)
ONES = torch.ones(2)


def call(**overrides):
    arguments = {
        "logprobs": LOGPROBS,
        "advantages": ONES,
        "surrogate": Clip(),
        "aggregate": SequenceMean(),
    }
    return policy_loss(**(arguments | overrides))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"logprobs": [0.0]}, TypeError, r"logprobs must be a torch.Tensor, got list"),
        ({"logprobs": LOGPROBS.long()}, TypeError, r"logprobs must be a floating-point tensor"),
        ({"logprobs": torch.zeros(3)}, ValueError, r"logprobs must have shape \[B, T\]"),
        ({"mask": torch.ones(2, 2)}, ValueError, r"mask must have shape .* \[2, 3\], got \[2, 2\]"),
        ({"mask": [[1]]}, TypeError, r"mask must be a torch.Tensor"),
        ({"advantages": torch.ones(3)}, ValueError, r"advantages .* \[2, 3\] or \[B\] = \[2\]"),
        ({"advantages": torch.ones(2, 2)}, ValueError, r"advantages must .* got \[2, 2\]"),
        ({"advantages": torch.ones(2).int()}, TypeError, r"advantages must be a floating-point"),
        ({"old_logprobs": torch.zeros(2, 4)}, ValueError, r"old_logprobs must .* got \[2, 4\]"),
        ({"old_logprobs": LOGPROBS.int()}, TypeError, r"old_logprobs must be a floating-point"),
        ({"ref_logprobs": torch.zeros(3, 2)}, ValueError, r"ref_logprobs must have shape"),
        ({"entropy": torch.zeros(2)}, ValueError, r"entropy must have shape"),
        (
            {"surrogate": Clip},
            TypeError,
            r"surrogate must be a value such as Clip\(\), got type",
        ),
        ({"surrogate": "grpo"}, TypeError, r"surrogate must be a value .* got str 'grpo'"),
        ({"aggregate": SequenceMean}, TypeError, r"aggregate must be a value such as Sequ"),
        ({"kl": K3}, TypeError, r"kl must be a value such as K3\(\), got type"),
        (
            {"surrogate": Vespo(), "importance_weights": torch.ones(2)},
            ValueError,
            r"importance_weights must have shape of logprobs = \[2, 3\], got \[2\]",
        ),
        ({"kl_coef": 0.1}, ValueError, r"kl_coef=0.1 needs ref_logprobs, got None"),
        ({"entropy_coef": 0.1}, ValueError, r"entropy_coef=0.1 needs entropy, got None"),
        ({"kl_coef": "0.1"}, TypeError, r"kl_coef must be a number"),
        ({"kl_coef": float("nan")}, ValueError, r"kl_coef must be >= 0, got nan"),
        ({"importance_weights": torch.ones(3)}, ValueError, r"importance_weights must have shape"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"logprobs must have shape \[L\]"),
        (
            {"logprobs": torch.zeros(6), "cu_seqlens": torch.tensor([0.0, 3.0, 6.0])},
            TypeError,
            r"cu_seqlens must be an integer tensor",
        ),
        (
            {"logprobs": torch.zeros(6), "cu_seqlens": torch.zeros(0, dtype=torch.long)},
            ValueError,
            r"cu_seqlens must have shape \[B \+ 1\]",
        ),
        (
            {"logprobs": torch.zeros(6), "cu_seqlens": torch.tensor([0, 3, 5])},
            ValueError,
            r"cu_seqlens must rise from 0 to L = 6, got \[0, 3, 5\]",
        ),
    ],
)
def test_bad_inputs_are_refused(overrides, error, message):
    with pytest.raises(error, match=message):
        call(**overrides)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clip(low=-0.1), r"low must be >= 0.0, got -0.1"),
        (lambda: Clip(high=-0.1), r"high must be >= 0.0, got -0.1"),
        (lambda: Clip(high=0.5, dual=1.2), r"dual must be >= 1.5, got 1.2"),
        (lambda: SequenceClip(low=-1.0), r"low must be >= 0.0"),
        (lambda: Gmpo(high=-1.0), r"high must be >= 0.0"),
        (lambda: Cispo(max_ratio=0.2), r"max_ratio must be >= 1.0, got 0.2"),
        (lambda: Cispo(max_ratio=2.0, min_ratio=1.5), r"min_ratio must be <= 1.0, got 1.5"),
        (lambda: Sapo(tau_positive=0.0), r"tau_positive must be > 0.0"),
        (lambda: Vespo(lambda_negative=0.0), r"lambda_negative must be > 0.0"),
        (lambda: Vespo(k_positive=-1.0), r"k_positive must be >= 0.0"),
        (lambda: DppoTv(max_ratio=0.5), r"max_ratio must be >= 1.0"),
        (lambda: KlCov(share=0.0), r"share must be > 0.0"),
        (lambda: ClipCov(torch.Generator(), share=2.0), r"share must be <= 1.0"),
        (lambda: ClipCov(torch.Generator(), min_covariance=5.0), r"max_covariance must be > 5.0"),
        (lambda: FixedLength(0), r"length must be >= 1, got 0"),
        (lambda: SequenceMean(-1.0), r"denominator must be >= 0.0, got -1.0"),
        (lambda: TokenMean(torch.ones(2)), r"denominator must be .* one element, got shape \[2\]"),
        (lambda: SequenceMean(torch.tensor(-3)), r"denominator must be >= 0, got -3"),
        (lambda: TokenMean(torch.tensor(float("nan"))), r"denominator must be >= 0, got nan"),
        (lambda: Sum(float("inf")), r"denominator must be finite"),
    ],
)
def test_bad_hyperparameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types_of_hyperparameters():
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator, got int 0"):
        ClipCov(0)
    with pytest.raises(TypeError, match=r"length must be an int"):
        FixedLength(3.5)
    with pytest.raises(TypeError, match=r"max_ratio"):
        Cispo()
    with pytest.raises(TypeError, match=r"denominator must be a number"):
        SequenceMean("8")


def test_clipped_policy_loss_refuses_what_policy_loss_refuses():
    with pytest.raises(ValueError, match=r"low must be >= 0.0"):
        clipped_policy_loss(LOGPROBS, ONES, clip_low=-1.0)
    with pytest.raises(TypeError, match=r"logprobs must be a floating-point tensor"):
        clipped_policy_loss(LOGPROBS.long(), ONES)


@pytest.mark.parametrize("surrogate", ["grpo", Clip])
def test_linear_policy_loss_refuses_what_is_no_surrogate(surrogate):
    hidden, weight, targets = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3).long()
    with pytest.raises(TypeError, match=r"surrogate must be a value such as Clip\(\)"):
        linear_policy_loss(
            hidden, weight, targets, ONES, surrogate=surrogate, aggregate=SequenceMean()
        )


def test_errors_do_not_print_whole_inputs():
    with pytest.raises(TypeError) as error:
        call(logprobs=[0.0] * 1000)
    assert len(str(error.value)) < 200


def test_a_complex_denominator_is_refused() -> None:
    with pytest.raises(TypeError, match=r"denominator must be a real number, got torch\.complex64"):
        SequenceMean(torch.tensor(1j))
