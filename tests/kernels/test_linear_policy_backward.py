"""`linear_policy_loss`: its gradients, their dtypes and memory, and backwards over one forward."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import igrpo_kernels.cpu_head_softmax as cpu_head_softmax
import igrpo_kernels.row_selection as row_selection
from igrpo_kernels import (
    Clip,
    Reinforce,
    Sum,
    TokenMean,
    linear_policy_loss,
)
from igrpo_kernels.relative_softmax import SoftmaxRows, softmax_of_logits
from igrpo_kernels.row_softmax import LogitTransform, TargetColumns
from tests.kernels.linear_policy_cases import (
    B,
    H,
    T,
    assert_same,
    make_case,
)


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


@pytest.mark.parametrize("factor", [1.0, 0.25, 0.0, -1.0, 3.0])
def test_any_upstream_scalar(factor: float) -> None:
    case = make_case()
    options = {"surrogate": Clip(), "aggregate": TokenMean()}
    wanted = torch.autograd.grad(case.composed(**options).loss, case.leaves)
    (factor * case.fused(**options).loss).backward()
    for leaf, grad in zip(case.leaves, wanted, strict=True):
        torch.testing.assert_close(leaf.grad, factor * grad, rtol=1e-10, atol=1e-12)


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


def test_autocast_to_fp16_does_not_reach_the_gradients() -> None:
    case = make_case(torch.float32)
    options = {"surrogate": Clip(), "aggregate": Sum(denominator=1e9)}
    with torch.autocast("cpu", torch.float16):
        loss = case.fused(**options).loss
    grads = torch.autograd.grad(loss * 1e9, case.leaves)
    wanted = torch.autograd.grad(case.composed(**options).loss * 1e9, case.leaves)
    for grad, exact in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, exact, rtol=2e-2, atol=2e-2)  # inputs rounded to fp16
