"""The loss family against its formulas in plain Python floats."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from igrpo_kernels import (
    K1,
    K2,
    K3,
    Clip,
    FixedLength,
    RatioWeighted,
    SequenceClip,
    SequenceMean,
    Sum,
    TokenMean,
    clipped_policy_loss,
    surrogates,
)
from igrpo_kernels.kl import ScoreWeighted
from igrpo_kernels.loss_from_logprobs import policy_loss
from igrpo_kernels.loss_terms import TokenInputs
from igrpo_kernels.sequences import Sequences
from igrpo_kernels.surrogates import (
    Surrogate,
    TokenLosses,
)
from tests.kernels.loss_oracles import (
    AGGREGATES,
    LENGTHS,
    SURROGATES,
    clip_oracle,
    gspo_oracle,
    make_batch,
    oracle_of_batch,
    pack,
    run,
    without_ref,
)

# float64 on both sides: what is left is the order of a few dozen additions.
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def test_every_surrogate_has_a_formula():
    exported = {getattr(surrogates, name) for name in surrogates.__all__}
    classes = {x for x in exported if isinstance(x, type) and issubclass(x, Surrogate)}
    of_the_batch = {x for x in classes if x.scope == "batch"}
    assert classes - of_the_batch - {Surrogate} == {type(value) for value, _ in SURROGATES.values()}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_loss_and_gradient_equal_the_formula_in_plain_floats(surrogate, aggregate, seed):
    batch = without_ref(make_batch(seed))
    value, oracle = SURROGATES[surrogate]
    weights, weight = AGGREGATES[aggregate]
    expected = oracle_of_batch(batch, oracle, weight)
    loss, grad, _ = run(batch, surrogate=value, aggregate=weights)
    torch.testing.assert_close(loss, expected[0], **EXACT)
    torch.testing.assert_close(grad, expected[1], **EXACT)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_packed_equals_padded(surrogate):
    batch = make_batch(3)
    options = {
        "surrogate": SURROGATES[surrogate][0],
        "kl_coef": 0.1,
    }
    if not options["surrogate"].folds_importance_weights:
        options["importance_weights"] = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64)
    for aggregate, _ in AGGREGATES.values():
        padded = run(batch, aggregate=aggregate, **options)
        packed = run(pack(batch), aggregate=aggregate, **options)
        torch.testing.assert_close(packed[0], padded[0], **EXACT)
        torch.testing.assert_close(packed[1], padded[1][batch["mask"]], **EXACT)
        assert packed[2].keys() == padded[2].keys()
        for name in packed[2]:
            torch.testing.assert_close(packed[2][name], padded[2][name], **EXACT)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_masked_junk_gets_a_gradient_of_exactly_zero(surrogate):
    batch = make_batch(4)
    _, grad, _ = run(batch, surrogate=SURROGATES[surrogate][0], aggregate=TokenMean(), kl_coef=0.2)
    assert (grad[~batch["mask"]] == 0).all()
    assert grad.isfinite().all()


class Probability:
    """A surrogate of a user's own, which is 1 and not 0 in masked slots."""

    scope = "token"
    folds_importance_weights = False

    def __call__(self, tokens):
        return TokenLosses(tokens.logprobs.exp())


def test_masked_slots_do_not_count_whatever_a_surrogate_returns():
    batch = without_ref(make_batch(4))
    loss, grad, metrics = run(batch, surrogate=Probability(), aggregate=Sum())
    expected = batch["logprobs"][batch["mask"]].exp()
    torch.testing.assert_close(loss, expected.sum(), **EXACT)
    torch.testing.assert_close(grad[batch["mask"]], expected, **EXACT)
    assert (grad[~batch["mask"]] == 0).all()
    assert metrics.keys() == {"logprob", "ratio"}


@pytest.mark.parametrize("name", ["sequence-mean", "token-mean", "fixed-length", "sum"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_micro_batches_add_up_to_one_batch(surrogate, name):
    batch = without_ref(make_batch(5))
    tokens, sequences = batch["mask"].sum(), len(LENGTHS)
    whole = {
        "sequence-mean": SequenceMean(),
        "token-mean": TokenMean(),
        "fixed-length": FixedLength(9),
        "sum": Sum(),
    }[name]
    part = {
        "sequence-mean": SequenceMean(sequences),
        "token-mean": TokenMean(tokens),
        "fixed-length": FixedLength(9, torch.tensor(sequences)),
        "sum": Sum(),
    }[name]
    surrogate = SURROGATES[surrogate][0]
    loss, grad, _ = run(batch, surrogate=surrogate, aggregate=whole)
    pieces = [
        run({k: v[i:j] for k, v in batch.items()}, surrogate=surrogate, aggregate=part)
        for i, j in pairwise((0, 1, 3, 4))
    ]
    torch.testing.assert_close(sum(p[0] for p in pieces), loss, **EXACT)
    torch.testing.assert_close(torch.cat([p[1] for p in pieces]), grad, **EXACT)


GRADCHECKED = ["clip", "dual-clip", "gspo", "gmpo", "reinforce", "sapo"]


@pytest.mark.parametrize("kl", [K1(), K2(), K3(), RatioWeighted(K3()), RatioWeighted(K1())])
@pytest.mark.parametrize("surrogate", GRADCHECKED)
def test_gradcheck(surrogate, kl):
    """Surrogates without a stopped gradient are what their derivative says."""
    batch = make_batch(6, lengths=[3, 2])
    advantages, mask = batch.pop("advantages"), batch.pop("mask")
    logprobs = torch.where(mask, batch.pop("logprobs"), 0.0).requires_grad_()

    def loss(lp):
        return policy_loss(
            lp,
            advantages,
            mask,
            surrogate=SURROGATES[surrogate][0],
            aggregate=SequenceMean(),
            kl_coef=0.3,
            kl=kl,
            **batch,
        ).loss

    assert torch.autograd.gradcheck(loss, (logprobs,))


@pytest.mark.parametrize("spread", [1e-5, 1e-4, 1e-3])
def test_k3_of_close_policies_is_not_rounding(spread):
    logprobs = -5 * torch.rand(1, 100_000)
    ref_logprobs = logprobs + spread * torch.randn(1, 100_000)
    options = {"surrogate": Clip(), "aggregate": SequenceMean(), "ref_logprobs": ref_logprobs}
    kl = policy_loss(logprobs, torch.ones(1), **options).metrics["kl"].item()
    x = ref_logprobs.double() - logprobs.double()
    # one rounding of expm1 a token, 6e-8 of x beside x^2 / 2: a percent at 1e-5, both ways
    assert kl == pytest.approx((x.square() / 2 + x**3 / 6).mean().item(), rel=5e-3)
    tokens = TokenInputs(Sequences.of(logprobs), torch.ones(1, 1)).tokens(logprobs)
    assert (K3()(tokens, ref_logprobs) >= 0).all()


def test_k3_of_far_policies_stops_and_leads_no_further_away():
    logprobs = torch.tensor([[-3.0, -25.0]], requires_grad=True)
    tokens = TokenInputs(Sequences.of(logprobs), torch.ones(1, 1)).tokens(logprobs)
    kl = K3()(tokens, torch.tensor([[-1.0, -1.0]]))
    kl.sum().backward()
    assert kl.tolist() == [pytest.approx([math.expm1(2) - 2, math.expm1(20) - 20])]
    assert logprobs.grad.tolist() == [pytest.approx([-math.expm1(2), 0.0])]


def kl_oracle(estimate):
    """Value and derivative of each estimator at x = log pi, given log pi_old and log pi_ref."""
    return {
        "k1": lambda x, y, z: (x - z, 1.0),
        "k2": lambda x, y, z: ((x - z) ** 2 / 2, x - z),
        "k3": lambda x, y, z: (math.exp(z - x) - (z - x) - 1, 1 - math.exp(z - x)),
    }[estimate]


@pytest.mark.parametrize("weighting", ["plain", "ratio", "score"])
@pytest.mark.parametrize("estimate", ["k1", "k2", "k3"])
def test_kl_estimators_in_their_weightings(estimate, weighting):
    batch = make_batch(7)
    batch["advantages"] = torch.zeros(len(LENGTHS), dtype=torch.float64)
    value = {"k1": K1(), "k2": K2(), "k3": K3()}[estimate]
    value = {"plain": value, "ratio": RatioWeighted(value), "score": ScoreWeighted(value)}[
        weighting
    ]
    loss, grad, metrics = run(batch, surrogate=Clip(), aggregate=Sum(), kl_coef=0.25, kl=value)
    total, expected = 0.0, torch.zeros_like(grad)
    for i, j in batch["mask"].nonzero().tolist():
        x, y, z = (batch[k][i, j].item() for k in ("logprobs", "old_logprobs", "ref_logprobs"))
        kl, slope = kl_oracle(estimate)(x, y, z)
        ratio = math.exp(x - y)
        if weighting == "ratio":
            kl, slope = ratio * kl, ratio * (kl + slope)
        elif weighting == "score":
            slope = kl + slope
        total += kl
        expected[i, j] = 0.25 * slope
    torch.testing.assert_close(loss, torch.tensor(0.25 * total, dtype=loss.dtype), **EXACT)
    torch.testing.assert_close(grad, expected, **EXACT)
    mean = torch.tensor(total / sum(LENGTHS), dtype=loss.dtype)
    torch.testing.assert_close(metrics["kl"], mean, **EXACT)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_importance_weights_scale_the_surrogate_alone(surrogate):
    """Vespo folds them into its sequence weight; every other surrogate is multiplied."""
    batch = make_batch(8)
    value = SURROGATES[surrogate][0]
    options = {"surrogate": value, "aggregate": Sum(), "kl_coef": 0.2}
    weights = torch.rand(batch["mask"].shape, dtype=torch.float64) + 0.5
    kl = run(batch | {"advantages": torch.zeros(4, dtype=torch.float64)}, **options)
    plain = run(batch, **options)
    ones = run(batch, importance_weights=torch.ones_like(weights), **options)
    weighted = run(batch, importance_weights=weights, **options)
    torch.testing.assert_close(ones[1], plain[1], **EXACT)
    surrogate_grad = plain[1] - kl[1]
    if surrogate in ("vespo", "vespo-other"):
        folded = oracle_of_batch(
            batch | {"old_logprobs": batch["old_logprobs"] - weights.log()},
            SURROGATES[surrogate][1],
            lambda lengths, i: 1.0,
        )
        torch.testing.assert_close(weighted[1] - kl[1], folded[1], rtol=1e-9, atol=1e-11)
    elif surrogate in ("gspo", "gmpo"):
        scale = torch.where(batch["mask"], weights, 0.0).sum(-1, keepdim=True)
        scale = scale / batch["mask"].sum(-1, keepdim=True)
        torch.testing.assert_close(weighted[1] - kl[1], surrogate_grad * scale, **EXACT)
    else:
        scale = torch.where(batch["mask"], weights, 0.0)
        torch.testing.assert_close(weighted[1] - kl[1], surrogate_grad * scale, **EXACT)


def test_entropy_bonus_is_subtracted_and_differentiable():
    batch = without_ref(make_batch(9))
    entropy = torch.rand(batch["mask"].shape, dtype=torch.float64, requires_grad=True)
    options = {"surrogate": Clip(), "aggregate": TokenMean()}
    plain, _, _ = run(batch, **options)
    out = policy_loss(**batch, entropy=entropy, entropy_coef=0.3, **options)
    mean = entropy.detach()[batch["mask"]].mean()
    torch.testing.assert_close(out.loss.detach(), plain - 0.3 * mean, **EXACT)
    torch.testing.assert_close(out.metrics["entropy"], mean, **EXACT)
    (grad,) = torch.autograd.grad(out.loss, entropy)
    expected = batch["mask"].to(grad.dtype) * (-0.3 / sum(LENGTHS))
    torch.testing.assert_close(grad, expected, **EXACT)


def test_clip_fractions_and_ratio_by_hand():
    ratio = torch.tensor([[0.7, 0.7, 1.5, 1.5, 1.0, 9.0]], dtype=torch.float64)
    advantages = torch.tensor([[-1.0, 1.0, -1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    out = policy_loss(
        ratio.log(),
        advantages,
        mask,
        surrogate=Clip(0.2, 0.2),
        aggregate=TokenMean(),
        old_logprobs=torch.zeros_like(ratio),
    )
    # losses: 0.8, -0.7, 1.5, -1.2, -1.0
    torch.testing.assert_close(out.loss, torch.tensor(-0.6 / 5, dtype=torch.float64), **EXACT)
    metrics = {k: v.item() for k, v in out.metrics.items()}
    logprob = math.log(0.7 * 0.7 * 1.5 * 1.5) / 5
    clipped = {"clip_fraction_low": 0.2, "clip_fraction_high": 0.2}
    assert metrics == pytest.approx({"logprob": logprob, "ratio": 5.4 / 5} | clipped)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_on_policy_gradient_is_minus_the_advantage(surrogate):
    """At ratio 1 every surrogate is REINFORCE: rewarded tokens go up, punished ones down."""
    value = SURROGATES[surrogate][0]
    batch = without_ref(make_batch(10))
    del batch["old_logprobs"]
    _, grad, metrics = run(batch, surrogate=value, aggregate=Sum())
    expected = torch.where(batch["mask"], -batch["advantages"][:, None], 0.0)
    torch.testing.assert_close(grad, expected, **EXACT)
    assert metrics["ratio"].item() == 1.0


def test_luspo_is_the_sequence_clip_summed_over_tokens():
    batch = without_ref(make_batch(11))
    oracle = gspo_oracle(2e-3, 2.5e-3)
    expected = oracle_of_batch(batch, oracle, lambda lengths, i: 1 / len(lengths))
    loss, grad, _ = run(batch, surrogate=SequenceClip(2e-3, 2.5e-3), aggregate=FixedLength(1))
    torch.testing.assert_close(loss, expected[0], **EXACT)
    torch.testing.assert_close(grad, expected[1], **EXACT)


def test_clipped_policy_loss_is_the_clip_before_the_average():
    batch = without_ref(make_batch(12))
    losses = clipped_policy_loss(**batch, clip_low=0.1, clip_high=0.3, dual_clip=2.0)
    assert (losses[~batch["mask"]] == 0).all()
    whole, _, _ = run(batch, surrogate=Clip(0.1, 0.3, 2.0), aggregate=Sum())
    torch.testing.assert_close(losses.sum(), whole, **EXACT)
    expected = oracle_of_batch(batch, clip_oracle(0.1, 0.3, 2.0), lambda lengths, i: 1.0)
    torch.testing.assert_close(losses.sum(), expected[0], **EXACT)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_extreme_log_ratios_stay_finite(surrogate):
    """A ratio of e^200 against a positive advantage is clipped, not 0 * inf."""
    logprobs = torch.tensor([[-0.1, -300.0, -0.1]], requires_grad=True)
    old = torch.tensor([[-200.0, -0.1, -0.1]])
    for advantage in (1.0, -1.0, 0.0):
        out = policy_loss(
            logprobs,
            torch.tensor([advantage]),
            surrogate=SURROGATES[surrogate][0],
            aggregate=TokenMean(),
            old_logprobs=old,
            ref_logprobs=old,
            kl_coef=0.1,
        )
        (grad,) = torch.autograd.grad(out.loss, logprobs)
        assert out.loss.isfinite()
        assert grad.isfinite().all()


def test_nothing_counts_gives_zero_on_the_graph():
    for shape in [(2, 3), (0, 3), (2, 0)]:
        logprobs = torch.full(shape, float("nan"), requires_grad=True)
        for aggregate, _ in AGGREGATES.values():
            out = policy_loss(
                logprobs,
                torch.ones(shape[0]),
                torch.zeros(shape),
                surrogate=Clip(),
                aggregate=aggregate,
            )
            (grad,) = torch.autograd.grad(out.loss, logprobs)
            assert out.loss.item() == 0.0
            assert torch.equal(grad, torch.zeros(shape))


def test_denominator_of_zero_gives_zero():
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    for aggregate in (SequenceMean(0), TokenMean(torch.tensor(0)), FixedLength(3, 0), Sum(0.0)):
        out = policy_loss(logprobs, torch.ones(1), surrogate=Clip(), aggregate=aggregate)
        (grad,) = torch.autograd.grad(out.loss, logprobs)
        assert (out.loss.item(), grad.item()) == (0.0, 0.0)


def test_half_precision_is_computed_in_float32():
    batch = without_ref(make_batch(13, dtype=torch.float32))
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    upcast = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    options = {"surrogate": Clip(), "aggregate": SequenceMean()}
    loss, grad, _ = run(half, **options)
    expected, expected_grad, _ = run(upcast, **options)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(grad, expected_grad.bfloat16())


@given(st.permutations(range(4)), st.sampled_from(list(SURROGATES)), st.integers(0, 5))
def test_order_of_sequences_does_not_matter(order, surrogate, seed):
    batch = without_ref(make_batch(seed))
    options = {"surrogate": SURROGATES[surrogate][0], "aggregate": SequenceMean()}
    loss, grad, _ = run(batch, **options)
    shuffled_loss, shuffled, _ = run({k: v[list(order)] for k, v in batch.items()}, **options)
    torch.testing.assert_close(shuffled_loss, loss, **EXACT)
    torch.testing.assert_close(shuffled, grad[list(order)], **EXACT)


def test_advantages_per_token_per_sequence_and_as_a_column():
    batch = without_ref(make_batch(14))
    options = {"surrogate": Clip(), "aggregate": SequenceMean()}
    expected = run(batch, **options)
    column = run(batch | {"advantages": batch["advantages"][:, None]}, **options)
    per_token = batch["advantages"][:, None].expand(batch["mask"].shape).clone()
    per_token[~batch["mask"]] = float("nan")
    tokens = run(batch | {"advantages": per_token}, **options)
    for other in (column, tokens):
        torch.testing.assert_close(other[0], expected[0], **EXACT)
        torch.testing.assert_close(other[1], expected[1], **EXACT)


def test_no_gradient_flows_to_anything_but_logprobs_and_entropy():
    batch = make_batch(15)
    constants = {
        k: torch.where(batch["mask"], v, 0.0).requires_grad_()
        if v.dim() == 2
        else v.requires_grad_()
        for k, v in batch.items()
        if k != "mask"
    }
    out = policy_loss(
        **constants,
        mask=batch["mask"],
        surrogate=Clip(),
        aggregate=Sum(),
        kl_coef=0.1,
        importance_weights=torch.ones(4, dtype=torch.float64, requires_grad=True),
    )
    out.loss.backward()
    assert constants["logprobs"].grad is not None
    assert all(v.grad is None for k, v in constants.items() if k != "logprobs")
    assert not any(v.requires_grad for v in out.metrics.values())


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_under_torch_compile_without_graph_breaks():
    batch = make_batch(16, dtype=torch.float32)

    def loss(lp, old):
        return policy_loss(
            lp,
            batch["advantages"],
            batch["mask"],
            surrogate=Clip(),
            aggregate=SequenceMean(),
            old_logprobs=old,
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    logprobs = torch.where(batch["mask"], batch["logprobs"], 0.0).requires_grad_()
    old = torch.where(batch["mask"], batch["old_logprobs"], 0.0)
    expected, actual = loss(logprobs, old), compiled(logprobs, old)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(actual, logprobs)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, logprobs)[0], rtol=0, atol=0)


def test_a_surrogate_of_an_unknown_scope_is_refused():
    class Misspelt(Probability):
        scope = "sentence"

    with pytest.raises(ValueError, match=r"surrogate.scope must be one of .*, got 'sentence'"):
        policy_loss(
            torch.zeros(1, 2), torch.ones(1), surrogate=Misspelt(), aggregate=SequenceMean()
        )
