"""`linear_policy_loss`: rows that cost nothing, and what masked slots may hold."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import igrpo_kernels.cpu_head_softmax as cpu_head_softmax
from igrpo_kernels import (
    Clip,
    Reinforce,
    SequenceClip,
    SequenceMean,
    Sum,
    TokenMean,
    linear_policy_loss,
    linear_token_logprobs,
)
from igrpo_kernels.surrogates import KlCov
from tests.kernels.linear_policy_cases import (
    SEQUENCE_LEVEL,
    TOKEN_LEVEL,
    B,
    H,
    T,
    V,
    assert_same,
    assert_same_metrics,
    make_case,
)


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


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    ("surrogate", "rows"),
    [(Clip(), None), (Clip(), 1), (SequenceClip(), None), (KlCov(share=0.2), None)],
    ids=repr,
)
def test_log_probs_and_entropies_are_those_of_the_op_alone(
    surrogate: Any, rows: int | None, entropy: bool
) -> None:
    case = make_case()
    options = {"surrogate": surrogate, "aggregate": TokenMean(), "return_entropy": entropy}
    options["chunk_bytes"] = None if rows is None else 4 * V * rows
    head = {"bias": case.bias, "mask": case.mask, "return_entropy": True}
    with torch.no_grad():
        known = linear_token_logprobs(case.hidden, case.weight, case.targets, **head)
    out, everything = case.fused(**options), case.fused(**options, all_metrics=True)
    active = case.mask.bool() & (case.advantages != 0)[:, None]
    computed = active if surrogate.scope != "batch" else case.mask.bool()
    for name, wanted in zip(("logprobs", "entropy"), known, strict=True):
        got, every = getattr(out, name), getattr(everything, name)
        if name == "entropy" and not entropy:
            assert got is every is None
            continue
        assert not got.requires_grad
        assert got.shape == case.targets.shape
        # how many rows stand beside a row may change its last bits
        torch.testing.assert_close(got, wanted.where(computed, 0.0), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(every, wanted, rtol=1e-12, atol=1e-14)


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
