"""`linear_policy_loss` is `policy_loss` of `linear_token_logprobs`, with rows that cost nothing."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import igrpo_kernels.cpu_head_softmax as cpu_head_softmax
import igrpo_kernels.linear_head as linear_head
import igrpo_kernels.row_selection as row_selection
from igrpo_kernels import (
    K1,
    K2,
    K3,
    Cispo,
    Clip,
    ClipCov,
    DppoKl,
    DppoTv,
    FixedLength,
    Gmpo,
    KlCov,
    PolicyLoss,
    RatioWeighted,
    Reinforce,
    Sapo,
    ScoreWeighted,
    SequenceClip,
    SequenceMean,
    SequenceTokenClip,
    Sum,
    TokenMean,
    Vespo,
    linear_policy_loss,
    linear_token_logprobs,
    policy_loss,
)
from igrpo_kernels.relative_softmax import (
    LogitTransform,
    ProductGradient,
    SoftmaxRows,
    TargetColumns,
    softmax_of_logits,
)

B, T, H, V = 4, 5, 3, 11
TOKEN_LEVEL = [
    Clip(0.2, 0.28),
    Clip(0.2, 0.2, dual=3.0),
    Cispo(max_ratio=1.2),
    Sapo(),
    Reinforce(),
    DppoTv(low=0.02, high=0.02),
    DppoKl(low=0.02, high=0.02),
]
SEQUENCE_LEVEL = [SequenceClip(), SequenceTokenClip(), Gmpo(), Vespo()]
BATCH_LEVEL = [KlCov(share=0.2)]
AGGREGATES = [SequenceMean(), TokenMean(), FixedLength(7), Sum(denominator=3.0)]
HEAD = ("temperature", "bias", "softcap", "logit_scale")


@dataclass
class Case:
    """One batch: the leaves, and what else both sides are given."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    advantages: Tensor
    mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def fused(self, **options: Any) -> PolicyLoss:
        options = {"bias": self.bias, "old_logprobs": self.old_logprobs, **options}
        return linear_policy_loss(
            self.hidden, self.weight, self.targets, self.advantages, self.mask, **options
        )

    def composed(self, **options: Any) -> PolicyLoss:
        """What the op is defined to be."""
        options = {"bias": self.bias, "old_logprobs": self.old_logprobs, **options}
        for name in ("return_entropy", "all_metrics"):
            options.pop(name, None)
        head = {name: options.pop(name) for name in HEAD if name in options}
        logprobs, entropy = linear_token_logprobs(
            self.hidden, self.weight, self.targets, mask=self.mask, return_entropy=True, **head
        )
        return policy_loss(logprobs, self.advantages, self.mask, entropy=entropy, **options)


def make_case(dtype: torch.dtype = torch.float64) -> Case:
    """Masked slots in every sequence but one, one group of zero advantage, ratios off one."""
    hidden = torch.randn(B, T, H).to(dtype).requires_grad_()
    weight = torch.randn(V, H).to(dtype).requires_grad_()
    bias = torch.randn(V).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (B, T))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        logits = torch.nn.functional.linear(hidden.to(wide), weight.to(wide), bias.to(wide))
        logprobs = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    return Case(
        hidden,
        weight,
        bias,
        targets,
        torch.tensor([1.5, -0.5, 0.0, 0.7], dtype=wide),
        mask,
        logprobs + 0.4 * torch.randn(B, T, dtype=wide),
        logprobs + torch.randn(B, T, dtype=wide),
    )


def assert_same(
    got: PolicyLoss, wanted: PolicyLoss, leaves: tuple[Tensor, ...], tolerance: float
) -> None:
    torch.testing.assert_close(got.loss, wanted.loss, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(got.loss * 1.7, leaves)
    exact = torch.autograd.grad(wanted.loss * 1.7, leaves)
    for grad, grad_wanted in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad, grad_wanted, rtol=tolerance, atol=tolerance)


def assert_same_metrics(got: PolicyLoss, wanted: PolicyLoss, tolerance: float) -> None:
    assert got.metrics.keys() == wanted.metrics.keys()
    for name, value in got.metrics.items():
        assert not value.requires_grad
        torch.testing.assert_close(value, wanted.metrics[name], rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["one chunk", "some chunks", "many chunks", "many slices"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with all rows in one chunk, and with each in a chunk, or a slice, of its own.

    Some chunks hold whole sequences.
    """
    if request.param == "some chunks":
        monkeypatch.setattr(cpu_head_softmax, "CHUNK_BYTES", 4 * V * T)
    if request.param == "many slices":
        monkeypatch.setattr(row_selection, "CACHE_BYTES", 0)
    if request.param == "many chunks":
        monkeypatch.setattr(cpu_head_softmax, "CHUNK_BYTES", 0)


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
        {"importance_weights": torch.rand(B, T).round() * 1.3},
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


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Rows of each product for logits, and of each for gradients."""
    rows: dict[str, list[int]] = {"logits": [], "gradients": []}
    products_, add = linear_head.LinearHead.products_, linear_head.HeadGradients.add

    def counting_products(self: Any, buffer: Tensor, hidden: Tensor) -> Tensor:
        rows["logits"].append(len(hidden))
        return products_(self, buffer, hidden)

    def counting_add(self: Any, where: Any, hidden: Tensor, gradient: ProductGradient) -> None:
        rows["gradients"].append(len(gradient.matrix))
        add(self, where, hidden, gradient)

    monkeypatch.setattr(linear_head.LinearHead, "products_", counting_products)
    monkeypatch.setattr(linear_head.HeadGradients, "add", counting_add)
    return rows


def test_rows_that_cannot_matter_cost_nothing(products: dict[str, list[int]]) -> None:
    case = make_case()
    case.fused(surrogate=Reinforce(), aggregate=TokenMean()).loss.backward()
    assert products == {"logits": [9], "gradients": [9]}  # 12 count, 3 of them at advantage zero


def test_kl_and_entropy_keep_rows_of_zero_advantage(products: dict[str, list[int]]) -> None:
    case = make_case()
    options = {"surrogate": Reinforce(), "aggregate": TokenMean()}
    case.fused(**options, entropy_coef=0.1)
    case.fused(**options, kl_coef=0.1, ref_logprobs=case.ref_logprobs)
    assert products["logits"] == [12, 12]


def test_rows_of_zero_importance_weight_cost_nothing(products: dict[str, list[int]]) -> None:
    case = make_case()
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    case.fused(surrogate=Reinforce(), aggregate=TokenMean(), importance_weights=weights)
    assert products["logits"] == [4]


@pytest.mark.parametrize("surrogate", SEQUENCE_LEVEL, ids=repr)
def test_whole_sequences_go_through_once(
    surrogate: Any, products: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_head_softmax, "CHUNK_BYTES", 4 * V * 6)
    case = make_case()
    got = case.fused(surrogate=surrogate, aggregate=SequenceMean())
    # of 3, 5, 3 and 1 tokens; the third has an advantage of zero, and the last fits behind it
    assert products["logits"] == [3, 6]
    assert sum(products["gradients"]) <= 9
    products["logits"].clear()
    assert_same(
        got, case.composed(surrogate=surrogate, aggregate=SequenceMean()), case.leaves, 1e-10
    )


def test_a_sequence_longer_than_a_chunk_goes_through_twice(
    products: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_head_softmax, "CHUNK_BYTES", 4 * V * 4)
    case = make_case()
    options = {"surrogate": SequenceClip(0.9, 0.9), "aggregate": SequenceMean()}
    got = case.fused(**options)
    assert products == {"logits": [4, 4, 4], "gradients": []}
    got.loss.backward(inputs=case.leaves)
    assert products["logits"] == [4, 4, 4, 3, 3, 3]


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("surrogate", SEQUENCE_LEVEL, ids=repr)
@pytest.mark.parametrize("weighted", [False, True])
def test_one_token_of_an_advantage_keeps_its_whole_sequence(
    surrogate: Any, weighted: bool, products: dict[str, list[int]]
) -> None:
    case = make_case()
    advantages = torch.zeros(B, T, dtype=torch.float64)
    advantages[1, 2], advantages[2, 1], advantages[2, 4] = 0.7, -1.1, 5.0  # the last is masked
    case = replace(case, advantages=advantages)
    options: dict[str, Any] = {"surrogate": surrogate, "aggregate": SequenceMean()}
    if weighted:
        options["importance_weights"] = torch.ones(B, T, dtype=torch.float64)
        options["importance_weights"][1] = 0.0
    got = case.fused(**options)
    keeps_both = not weighted or surrogate.folds_importance_weights
    once = sum(products["logits"])
    assert once in (8 if keeps_both else 3, 12)  # 12: in two passes
    assert_same(got, case.composed(**options), case.leaves, 1e-10)


@pytest.mark.usefixtures("chunked")
def test_clipped_rows_cost_no_gradient(products: dict[str, list[int]]) -> None:
    case = make_case()
    off = torch.tensor([-2.0, 0.0, 0.0, 0.0, 0.0])  # ratio far above one at the first token
    with torch.no_grad():
        logprobs = linear_token_logprobs(case.hidden, case.weight, case.targets, bias=case.bias)
    options = {"surrogate": Clip(), "aggregate": TokenMean(), "old_logprobs": logprobs + off}
    products["logits"].clear()
    got = case.fused(**options)
    assert sum(products["logits"]) == 9
    assert sum(products["gradients"]) == 7  # sequences 0 and 3 have their first token clipped
    assert_same(got, case.composed(**options), case.leaves, 1e-10)
    assert got.metrics["clip_fraction_high"] == pytest.approx(2 / 9)


def test_metrics_are_of_the_rows_computed_or_of_all(products: dict[str, list[int]]) -> None:
    case = make_case()
    options = {"surrogate": Clip(), "aggregate": TokenMean()}
    active = case.fused(**options, return_entropy=True)
    everything = case.fused(**options, return_entropy=True, all_metrics=True)
    assert products["logits"] == [9, 9, 3]
    assert torch.equal(active.loss, everything.loss)
    assert_same_metrics(everything, case.composed(**options), 1e-10)
    moving = replace(case, mask=case.mask * (case.advantages != 0)[:, None])
    assert_same_metrics(active, moving.composed(**options), 1e-10)


@pytest.mark.parametrize("surrogate", SEQUENCE_LEVEL, ids=repr)
def test_metrics_over_sequences_are_of_the_rows_computed_or_of_all(surrogate: Any) -> None:
    case = make_case()
    options = {"surrogate": surrogate, "aggregate": TokenMean()}
    everything = case.fused(**options, return_entropy=True, all_metrics=True)
    assert_same_metrics(everything, case.composed(**options), 1e-10)
    active = case.fused(**options, return_entropy=True)
    moving = replace(case, mask=case.mask * (case.advantages != 0)[:, None])
    assert_same_metrics(active, moving.composed(**options), 1e-10)


@pytest.mark.parametrize("surrogate", TOKEN_LEVEL + SEQUENCE_LEVEL, ids=repr)
def test_surrogates_vanish_with_their_advantages(surrogate: Any) -> None:
    case = replace(make_case(), advantages=torch.zeros(B, dtype=torch.float64))
    wanted = case.composed(surrogate=surrogate, aggregate=Sum())
    assert wanted.loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(wanted.loss, case.leaves))
    got = case.fused(surrogate=surrogate, aggregate=Sum())
    assert got.loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(got.loss, case.leaves))


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("surrogate", [Clip(), SequenceClip()], ids=repr)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf")])
def test_zero_times_infinity_on_masked_slots(surrogate: Any, junk: float) -> None:
    case = make_case()
    options = {"surrogate": surrogate, "aggregate": SequenceMean(), "kl_coef": 0.1}
    clean = case.fused(**options, ref_logprobs=case.ref_logprobs)
    grads = torch.autograd.grad(clean.loss, case.leaves)
    out = case.mask == 0
    with torch.no_grad():
        case.hidden[out] = junk
    case.targets[out] = -100
    case.old_logprobs[out] = junk
    case.ref_logprobs[out] = junk
    dirty = case.fused(**options, ref_logprobs=case.ref_logprobs)
    assert torch.equal(dirty.loss, clean.loss)
    for grad, wanted in zip(torch.autograd.grad(dirty.loss, case.leaves), grads, strict=True):
        assert torch.equal(grad, wanted)


@pytest.mark.parametrize("surrogate", [Clip(), SequenceClip()], ids=repr)
def test_nothing_counts_and_the_loss_stays_on_the_graph_trl_7077(surrogate: Any) -> None:
    case = replace(make_case(), mask=torch.zeros(B, T))
    out = case.fused(surrogate=surrogate, aggregate=TokenMean(), all_metrics=True)
    assert out.loss == 0
    for grad in torch.autograd.grad(out.loss, case.leaves):
        assert (grad == 0).all()
    assert all(value == 0 for value in out.metrics.values())


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_no_sequences_or_no_tokens(shape: tuple[int, int]) -> None:
    hidden = torch.randn(*shape, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    out = linear_policy_loss(
        hidden,
        weight,
        torch.zeros(shape, dtype=torch.long),
        torch.ones(shape[0]),
        surrogate=Clip(),
        aggregate=SequenceMean(),
    )
    assert out.loss == 0
    out.loss.backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(V, H))


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


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_frozen_inputs_cost_nothing(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    options = {"surrogate": Clip(), "aggregate": TokenMean()}
    wanted = torch.autograd.grad(case.composed(**options).loss, getattr(case, trained))[0]
    frozen = {
        name: getattr(case, name).detach().requires_grad_(name == trained)
        for name in ("hidden", "weight", "bias")
    }
    shapes = []
    mm = torch.mm

    def counting_mm(a: Tensor, b: Tensor, **kwargs: Any) -> Tensor:
        shapes.append((*a.shape, b.shape[1]))
        return mm(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", counting_mm)
    moved = replace(case, **frozen)
    moved.fused(**options).loss.backward()
    assert len(shapes) == (1 if trained == "bias" else 2)
    torch.testing.assert_close(frozen[trained].grad, wanted, rtol=1e-10, atol=1e-10)
    assert all(leaf.grad is None for name, leaf in frozen.items() if name != trained)


def test_without_grad_no_gradient_is_computed(products: dict[str, list[int]]) -> None:
    case = make_case()
    options = {"surrogate": Clip(), "aggregate": TokenMean()}
    with torch.no_grad():
        out = case.fused(**options)
    assert not out.loss.requires_grad
    assert products["gradients"] == []
    torch.testing.assert_close(out.loss, case.composed(**options).loss, rtol=1e-10, atol=1e-10)


def test_second_backward_gives_the_same_gradient_quack_209() -> None:
    case = make_case()
    loss = case.fused(surrogate=Clip(), aggregate=TokenMean()).loss
    first = [grad.clone() for grad in torch.autograd.grad(loss, case.leaves, retain_graph=True)]
    for factor in (1.0, 3.0):
        grads = torch.autograd.grad(loss * factor, case.leaves, retain_graph=True)
        for grad, wanted in zip(grads, first, strict=True):
            torch.testing.assert_close(grad, factor * wanted, rtol=1e-12, atol=0)


def test_no_second_backward_and_no_second_copy_of_the_gradients() -> None:
    case = make_case()
    loss = case.fused(surrogate=Clip(), aggregate=TokenMean()).loss
    saved = [grad.data_ptr() for grad in loss.grad_fn.saved_tensors]
    (2.0 * loss).backward()
    assert [leaf.grad.data_ptr() for leaf in case.leaves if leaf.grad is not None] == saved
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_accumulating_over_two_backwards_leaves_the_saved_gradients_alone() -> None:
    case = make_case()
    loss = case.fused(surrogate=Clip(), aggregate=TokenMean()).loss
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in case.leaves if leaf.grad is not None]
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, grad in zip(case.leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, 3 * grad, rtol=1e-12, atol=0)


def test_gradients_of_fp16_do_not_underflow_before_the_loss_scale() -> None:
    case = make_case(torch.float16)
    loss = case.fused(surrogate=Clip(), aggregate=Sum(denominator=1e9)).loss
    scaled = torch.autograd.grad(loss * 1e9, case.leaves)
    wanted = torch.autograd.grad(case.composed(surrogate=Clip(), aggregate=Sum()).loss, case.leaves)
    for grad, exact in zip(scaled, wanted, strict=True):
        assert grad.dtype == torch.float16
        torch.testing.assert_close(grad, exact, rtol=2e-3, atol=2e-3)  # one rounding to fp16


@pytest.mark.parametrize("rows", [1, 64, 150])
def test_rounding_in_place_is_rounding(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    products, targets = torch.randn(rows, 33), torch.randint(0, 33, (rows,))
    upstream = torch.randn(rows)

    monkeypatch.setattr(row_selection, "CACHE_BYTES", 4 * 33 * 40)  # 40 rows

    def gradient(dtype: torch.dtype) -> Tensor:
        memory, at = products.clone(), TargetColumns(targets)
        found = softmax_of_logits(memory, at, entropy=False, out=memory)
        softmax = SoftmaxRows(found, at, LogitTransform(), memory)
        return softmax.gradient_(upstream, dtype=dtype).multiplied(dtype)

    rounded = gradient(torch.float32).bfloat16()
    torch.testing.assert_close(gradient(torch.bfloat16), rounded, rtol=0.0, atol=0.0)


def test_weight_gradient_is_not_summed_in_bf16_axolotl_1601(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_head_softmax, "CHUNK_BYTES", 0)  # as many chunks as rows
    hidden = torch.randn(4, 128, 8).bfloat16()
    weight = (torch.randn(16, 8) / 3).bfloat16().requires_grad_()
    targets = torch.randint(0, 16, (4, 128))
    options = {"surrogate": Reinforce(), "aggregate": Sum()}
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0])
    got = linear_policy_loss(hidden, weight, targets, advantages, **options).loss
    exact = weight.detach().double().requires_grad_()
    log_p = (hidden.double() @ exact.t()).log_softmax(-1)
    wanted = -(log_p.gather(-1, targets[..., None]).squeeze(-1) * advantages[:, None]).sum()
    (grad,) = torch.autograd.grad(got, weight)
    (grad_wanted,) = torch.autograd.grad(wanted, exact)
    one_rounding = torch.finfo(torch.bfloat16).eps / 2 * grad_wanted.abs()
    assert ((grad.double() - grad_wanted).abs() <= one_rounding + 1e-4).all()


def test_the_same_call_gives_the_same_bits() -> None:
    case = make_case(torch.bfloat16)

    def run() -> list[Tensor]:
        loss = case.fused(surrogate=Clip(), aggregate=TokenMean(), entropy_coef=0.1).loss
        return [loss, *torch.autograd.grad(loss, case.leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_views_and_autocast() -> None:
    base = torch.randn(B, T + 1, H, requires_grad=True)
    case = replace(make_case(torch.float32), hidden=base[:, :-1])
    options = {"surrogate": Clip(), "aggregate": TokenMean()}
    leaves = (base, case.weight, case.bias)
    assert_same(case.fused(**options), case.composed(**options), leaves, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        fused, composed = case.fused(**options), case.composed(**options)
    for grad in torch.autograd.grad(fused.loss, leaves, retain_graph=True):
        assert grad.dtype == torch.float32
    assert_same(fused, composed, leaves, 1e-2)  # bf16 products


@pytest.mark.parametrize("surrogate", [Clip(), SequenceClip()], ids=repr)
def test_compiles_without_a_graph_break_liger_1364(surrogate: Any) -> None:
    case = make_case(torch.float32)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moved = replace(case, hidden=hidden, weight=weight, bias=bias)
        return moved.fused(surrogate=surrogate, aggregate=TokenMean(), entropy_coef=0.1).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(*case.leaves), loss(*case.leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    pairs = zip(
        torch.autograd.grad(got, case.leaves), torch.autograd.grad(wanted, case.leaves), strict=True
    )
    for grad, exact in pairs:
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-6)


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


def test_autocast_to_fp16_does_not_reach_the_gradients() -> None:
    case = make_case(torch.float32)
    options = {"surrogate": Clip(), "aggregate": Sum(denominator=1e9)}
    with torch.autocast("cpu", torch.float16):
        loss = case.fused(**options).loss
    grads = torch.autograd.grad(loss * 1e9, case.leaves)
    wanted = torch.autograd.grad(case.composed(**options).loss * 1e9, case.leaves)
    for grad, exact in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, exact, rtol=2e-2, atol=2e-2)  # inputs rounded to fp16
