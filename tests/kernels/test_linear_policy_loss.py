"""`linear_policy_loss` is `policy_loss` of `linear_token_logprobs`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from igrpo_kernels import (
    K1,
    K2,
    K3,
    Clip,
    FixedLength,
    RatioWeighted,
    Reinforce,
    Sapo,
    SequenceClip,
    SequenceMean,
    TokenMean,
    linear_policy_loss,
    linear_token_logprobs,
)
from igrpo_kernels.kl import ScoreWeighted
from igrpo_kernels.loss_from_logprobs import PolicyLoss, policy_loss
from igrpo_kernels.surrogates import ClipCov
from tests.kernels.linear_policy_cases import (
    AGGREGATES,
    BATCH_LEVEL,
    SEQUENCE_LEVEL,
    TOKEN_LEVEL,
    B,
    Case,
    T,
    V,
    assert_same,
    assert_same_metrics,
    make_case,
)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("aggregate", AGGREGATES, ids=repr)
@pytest.mark.parametrize("surrogate", TOKEN_LEVEL + SEQUENCE_LEVEL + BATCH_LEVEL, ids=repr)
def test_policy_loss_of_the_logprobs(surrogate: Any, aggregate: Any) -> None:
    case = make_case()
    options = {"surrogate": surrogate, "aggregate": aggregate}
    got = case.fused(**options, all_metrics=True, return_entropy=True)
    wanted = case.composed(**options)
    assert_same(got, wanted, case.leaves, 1e-10)  # float64 on both sides
    assert_same_metrics(got, wanted, 1e-10)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize(
    "options",
    [
        {"old_logprobs": None},
        {"kl_coef": 0.1, "kl": K1()},
        {"kl_coef": 0.1, "kl": K2()},
        {"kl_coef": 0.1, "kl": K3()},
        {"kl_coef": 0.1, "kl": RatioWeighted(K3())},
        {"kl_coef": 0.1, "kl": ScoreWeighted(K3())},
        {"kl_coef": 0.0, "kl": K3()},
        {"entropy_coef": 0.05},
        {"entropy_coef": -0.05, "kl_coef": 0.2},
        {"importance_weights": torch.tensor([0.5, 1.5, 0.0, 2.0])},
        {"importance_weights": torch.tensor([0.0, 0.0, 0.0, 2.0])},  # the long ones for metrics
        {"importance_weights": (torch.arange(B * T).view(B, T) % 3 > 0) * 1.3},
        {"temperature": 0.6},
        {"temperature": torch.linspace(0.5, 2.0, B * T).view(B, T)},
        {"bias": None},
        {"softcap": 1.5, "logit_scale": 1.3, "entropy_coef": 0.1},
        {"softcap": 1.5, "temperature": 0.7},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("surrogate", [Clip(), SequenceClip()], ids=repr)
def test_every_option(options: dict[str, Any], surrogate: Any) -> None:
    case = make_case()
    if "kl" in options or "kl_coef" in options:
        options = {**options, "ref_logprobs": case.ref_logprobs}
    options = {"surrogate": surrogate, "aggregate": SequenceMean(), **options}
    got = case.fused(**options, all_metrics=True, return_entropy=True)
    wanted = case.composed(**options)
    leaves = case.leaves if options.get("bias", case.bias) is not None else case.leaves[:2]
    assert_same(got, wanted, leaves, 1e-10)
    assert_same_metrics(got, wanted, 1e-10)


def test_clip_cov_draws_the_same_tokens() -> None:
    case = make_case()

    def surrogate() -> ClipCov:
        generator = torch.Generator().manual_seed(1)
        return ClipCov(generator, share=0.3, min_covariance=-9.0, max_covariance=9.0)

    got = case.fused(surrogate=surrogate(), aggregate=TokenMean())
    wanted = case.composed(surrogate=surrogate(), aggregate=TokenMean())
    assert_same(got, wanted, case.leaves, 1e-10)


@pytest.mark.parametrize("surrogate", [Clip(), Clip(dual=3.0), Sapo(), Reinforce()], ids=repr)
def test_gradcheck(surrogate: Any) -> None:
    # those of detached weights have no finite differences, and are compared with autograd above
    case = make_case()
    # far enough from every edge of a clip for finite differences
    old = case.old_logprobs + 0.013

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moved = replace(case, hidden=hidden, weight=weight, bias=bias)
        return moved.fused(
            surrogate=surrogate,
            aggregate=TokenMean(),
            old_logprobs=old,
            ref_logprobs=case.ref_logprobs,
            kl_coef=0.1,
            entropy_coef=0.1,
            temperature=0.8,
            softcap=3.0,
        ).loss

    assert torch.autograd.gradcheck(loss, case.leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64_is_that_of_plain_torch(dtype: torch.dtype) -> None:
    case = make_case(dtype)
    options = {"surrogate": Clip(10.0, 10.0), "aggregate": SequenceMean(), "temperature": 0.9}

    def plain(leaves: list[Tensor]) -> list[Tensor]:
        hidden, weight, bias = leaves
        logits = torch.nn.functional.linear(hidden, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        log_p = (logits / 0.9).log_softmax(-1).gather(-1, case.targets[..., None]).squeeze(-1)
        out = policy_loss(
            log_p,
            case.advantages,
            case.mask,
            surrogate=Clip(10.0, 10.0),
            aggregate=SequenceMean(),
            old_logprobs=case.old_logprobs.to(log_p.dtype),
        )
        return [out.loss, *torch.autograd.grad(out.loss, leaves)]

    def leaves(to: torch.dtype) -> list[Tensor]:
        return [leaf.detach().to(to).requires_grad_() for leaf in case.leaves]

    out = case.fused(**options)
    got = [out.loss, *torch.autograd.grad(out.loss, case.leaves)]
    assert out.loss.dtype == torch.float32
    for value, same_dtype, exact in zip(
        got, plain(leaves(dtype)), plain(leaves(torch.float64)), strict=True
    ):
        error = (value.double() - exact).abs().max()
        plain_error = (same_dtype.double() - exact).abs().max()
        rounding = torch.finfo(value.dtype).eps * exact.abs().max()
        # no worse than twice plain torch, plus the rounding of the result
        assert error <= 2 * plain_error + rounding


def test_fp32_equals_the_composition_to_1e_6() -> None:
    case = make_case(torch.float32)
    options = {"surrogate": Clip(), "aggregate": TokenMean()}
    assert_same(case.fused(**options), case.composed(**options), case.leaves, 1e-6)


@pytest.mark.parametrize("surrogate", [Clip(), SequenceClip()], ids=repr)
@pytest.mark.parametrize("aggregate", AGGREGATES, ids=repr)
def test_packed_is_padded(surrogate: Any, aggregate: Any) -> None:
    case = make_case()
    case.mask = torch.arange(T) < torch.tensor([3, 5, 2, 4])[:, None]
    padded = case.fused(surrogate=surrogate, aggregate=aggregate)
    packed = linear_policy_loss(
        case.hidden[case.mask],
        case.weight,
        case.targets[case.mask],
        case.advantages,
        surrogate=surrogate,
        aggregate=aggregate,
        old_logprobs=case.old_logprobs[case.mask],
        bias=case.bias,
        cu_seqlens=torch.tensor([0, 3, 8, 10, 14]),
    )
    assert_same(packed, padded, case.leaves, 1e-10)
    assert_same_metrics(packed, padded, 1e-10)


@pytest.mark.parametrize("aggregate", [SequenceMean, TokenMean, lambda n: FixedLength(7, n)])
def test_micro_batches_add_up_liger_1082(aggregate: Callable[[float], Any]) -> None:
    case = make_case()
    denominator = 12.0 if aggregate is TokenMean else 4.0
    whole = case.fused(surrogate=Clip(), aggregate=aggregate(denominator))
    grads = torch.autograd.grad(whole.loss, case.leaves)
    total = [torch.zeros_like(leaf) for leaf in case.leaves]
    for part in (slice(0, 1), slice(1, 4)):
        names = ("targets", "advantages", "mask", "old_logprobs", "ref_logprobs")
        micro = replace(
            case, hidden=case.hidden[part], **{name: getattr(case, name)[part] for name in names}
        )
        loss = micro.fused(surrogate=Clip(), aggregate=aggregate(denominator)).loss
        for grad, share in zip(total, torch.autograd.grad(loss, case.leaves), strict=True):
            grad += share
    for grad, wanted in zip(total, grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-10)


def test_trl_and_liger_agree() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    case = make_case(torch.float32)
    got = case.fused(surrogate=Clip(), aggregate=SequenceMean(), temperature=0.9)
    logprobs = ChunkedLogProbFunction.apply(
        case.hidden.flatten(0, 1), case.weight, case.bias, case.targets.flatten(), 0.9, 4, None, 1.0
    )[0].view(B, T)
    ratio = torch.exp(logprobs - case.old_logprobs)
    advantages = case.advantages[:, None]
    losses = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    trl = ((losses * case.mask).sum(-1) / case.mask.sum(-1).clamp(min=1.0)).mean()
    liger = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo", temperature=0.9
    )(
        case.hidden,
        case.weight,
        case.targets,
        case.mask,
        case.advantages,
        bias=case.bias,
        old_per_token_logps=case.old_logprobs,
    )[0]
    for peer in (trl, liger):
        assert_same(got, PolicyLoss(peer, {}), case.leaves, 1e-5)
        got = case.fused(surrogate=Clip(), aggregate=SequenceMean(), temperature=0.9)


def test_rewarded_tokens_become_likelier() -> None:
    case = make_case()
    loss = case.fused(surrogate=Clip(), aggregate=TokenMean(), old_logprobs=None).loss
    (step,) = torch.autograd.grad(loss, case.bias)
    with torch.no_grad():
        before = linear_token_logprobs(case.hidden, case.weight, case.targets, bias=case.bias)
        after = linear_token_logprobs(
            case.hidden, case.weight, case.targets, bias=case.bias - 0.1 * step
        )
    gain = ((after - before) * case.advantages[:, None] * case.mask).sum()
    assert gain > 0


@pytest.mark.usefixtures("chunked")
@settings(max_examples=25)
@given(st.data())
def test_random_batches(data: st.DataObject) -> None:
    sequences, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    vocabulary = data.draw(st.integers(1, 17))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    leaves = tuple(
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((sequences, tokens, 3), (vocabulary, 3), (vocabulary,))
    )
    case = Case(
        *leaves,
        targets=torch.randint(0, vocabulary, (sequences, tokens)),
        advantages=torch.randn(sequences, dtype=torch.float64) * torch.randint(0, 2, (sequences,)),
        mask=torch.randint(0, 2, (sequences, tokens)),
        old_logprobs=-2 * torch.rand(sequences, tokens, dtype=torch.float64),
        ref_logprobs=-2 * torch.rand(sequences, tokens, dtype=torch.float64),
    )
    surrogate = data.draw(st.sampled_from(TOKEN_LEVEL + SEQUENCE_LEVEL[:4]))
    aggregate = data.draw(st.sampled_from(AGGREGATES))
    kl_coef = data.draw(st.sampled_from([0.0, 0.1]))
    options = {"surrogate": surrogate, "aggregate": aggregate, "ref_logprobs": case.ref_logprobs}
    options |= {"kl_coef": kl_coef, "entropy_coef": data.draw(st.sampled_from([0.0, 0.1]))}
    got = case.fused(**options, all_metrics=True, return_entropy=True)
    wanted = case.composed(**options)
    assert_same(got, wanted, leaves, 1e-8)
    assert_same_metrics(got, wanted, 1e-8)


def test_bad_input() -> None:
    case = make_case(torch.float32)
    options: dict[str, Any] = {"surrogate": Clip(), "aggregate": TokenMean()}
    for change, error, message in [
        ({"targets": case.targets.float()}, TypeError, "targets must be an integer tensor"),
        ({"targets": case.targets[:2]}, ValueError, "targets must have shape of the rows"),
        ({"targets": case.targets + V}, ValueError, r"targets must lie in \[0, V\) = \[0, 11\)"),
        ({"hidden": case.hidden[..., :2]}, ValueError, "hidden must have shape"),
        ({"weight": case.weight.double()}, TypeError, "hidden and weight must have one dtype"),
        ({"mask": case.mask[:1]}, ValueError, "mask must have shape"),
        ({"advantages": case.advantages[:3]}, ValueError, "advantages must have shape"),
        ({"advantages": case.targets}, TypeError, "advantages must be a floating-point"),
    ]:
        with pytest.raises(error, match=message):
            replace(case, **change).fused(**options)
    for change, error, message in [
        ({"kl_coef": 0.1}, ValueError, r"kl_coef=0\.1 needs ref_logprobs"),
        ({"kl_coef": "a"}, TypeError, "kl_coef must be a number"),
        ({"entropy_coef": float("nan")}, ValueError, "entropy_coef must be finite"),
        ({"old_logprobs": case.old_logprobs[:2]}, ValueError, "old_logprobs must have shape"),
        ({"ref_logprobs": case.ref_logprobs[:2]}, ValueError, "ref_logprobs must have shape"),
        ({"ref_logprobs": case.targets}, TypeError, "ref_logprobs must be a floating-point"),
        ({"importance_weights": torch.ones(9)}, ValueError, "importance_weights must have shape"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"temperature": torch.zeros(B, T)}, ValueError, r"temperature must be >= 1\.18e-38 and"),
        ({"bias": case.bias[:2]}, ValueError, "bias must have shape"),
        ({"softcap": -1.0}, ValueError, "softcap must be > 0"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "must have shape"),
    ]:
        with pytest.raises(error, match=message):
            case.fused(**{**options, **change})
