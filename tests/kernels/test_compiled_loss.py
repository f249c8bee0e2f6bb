"""`linear_policy_loss` under torch.compile: one pass there too, as an op."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from igrpo_kernels import (
    K1,
    K2,
    K3,
    Clip,
    RatioWeighted,
    SequenceClip,
    SequenceMean,
    Sum,
    TokenMean,
    clipped_policy_loss,
    linear_policy_loss,
    row_checks,
    surrogates,
)
from igrpo_kernels import cpu_head_softmax as cpu
from igrpo_kernels.compiled_loss import PARTS, put_together, take_apart
from igrpo_kernels.kl import ScoreWeighted
from igrpo_kernels.loss_from_logprobs import PolicyLoss, policy_loss
from igrpo_kernels.loss_terms import TokenObjective
from igrpo_kernels.surrogates import Surrogate, TokenLosses, Tokens
from tests.kernels.linear_policy_cases import (
    SEQUENCE_LEVEL,
    TOKEN_LEVEL,
    B,
    Case,
    H,
    T,
    V,
    make_case,
)

KLS = [K1(), K2(), K3(), RatioWeighted(K2()), ScoreWeighted(RatioWeighted(K1()))]


@pytest.mark.parametrize("kl", KLS, ids=repr)
@pytest.mark.parametrize("surrogate", TOKEN_LEVEL + SEQUENCE_LEVEL, ids=repr)
def test_an_objective_is_put_together_as_it_was(surrogate: Surrogate, kl: Any) -> None:
    objective = TokenObjective(surrogate, kl, 0.1, -1e-3)
    words, numbers = take_apart(objective)
    assert put_together(words, numbers) == objective


def test_every_surrogate_but_those_over_the_batch_has_a_name() -> None:
    public = [getattr(surrogates, name) for name in surrogates.__all__]
    kinds = {kind for kind in public if isinstance(kind, type) and issubclass(kind, Surrogate)}
    assert kinds - set(PARTS.values()) == {Surrogate, surrogates.ClipCov, surrogates.KlCov}


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Take the compiler's way from here on, without the minutes that tracing takes."""
    return lambda: monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def values(out: PolicyLoss, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Everything that a loss gives, its gradients under an upstream scalar of 1.5."""
    grads = torch.autograd.grad(out.loss * 1.5, leaves)
    scores = [part for part in (out.logprobs, out.entropy) if part is not None]
    assert all(not part.requires_grad for part in (*scores, *out.metrics.values()))
    return [out.loss.detach(), *(out.metrics[key] for key in sorted(out.metrics)), *scores, *grads]


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("surrogate", TOKEN_LEVEL + SEQUENCE_LEVEL, ids=repr)
def test_the_op_gives_the_bits_of_the_pass_in_one_pass(
    surrogate: Surrogate, untraced: Any, products: dict[str, list[int]]
) -> None:
    case = make_case()
    options = {
        "surrogate": surrogate,
        "aggregate": SequenceMean(),
        "temperature": torch.tensor(0.9),
    }
    wanted = values(case.fused(**options), case.leaves)
    once = {name: list(rows) for name, rows in products.items()}
    untraced()
    assert_equal(values(case.fused(**options), case.leaves), wanted)
    assert products == {name: rows * 2 for name, rows in once.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"kl_coef": 0.1, "kl": ScoreWeighted(K3()), "importance_weights": torch.rand(B, T)},
        {"entropy_coef": 0.1, "softcap": 3.0, "logit_scale": 1.2},
        {"return_entropy": True, "all_metrics": True, "old_logprobs": None},
        {"temperature": torch.linspace(0.5, 2.0, B * T).view(B, T), "skip_zero_rows": False},
        {"chunk_bytes": 8 * V, "bias": None},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option_reaches_the_op(
    options: dict[str, Any], untraced: Any, products: dict[str, list[int]]
) -> None:
    case = make_case()
    ref = case.ref_logprobs if "kl" in options else None
    options = {"temperature": torch.tensor(1.1), "ref_logprobs": ref, **options}
    leaves = case.leaves[: 2 if "bias" in options else 3]

    def run() -> list[Tensor]:
        return values(case.fused(surrogate=Clip(), aggregate=TokenMean(), **options), leaves)

    wanted, once = run(), list(products["logits"])
    untraced()
    assert_equal(run(), wanted)
    assert products["logits"] == once * 2


@pytest.mark.parametrize("masked", [False, True])
def test_packed_sequences_reach_the_op(masked: bool, untraced: Any) -> None:
    case = make_case()
    given = [part.flatten(0, 1) for part in (case.hidden, case.targets, case.old_logprobs)]
    mask = case.mask.flatten() if masked else None

    def run() -> list[Tensor]:
        out = linear_policy_loss(
            given[0], case.weight, given[1], case.advantages, mask, old_logprobs=given[2],
            surrogate=SequenceClip(), aggregate=TokenMean(),
            cu_seqlens=torch.arange(B + 1) * T, temperature=torch.ones(()),
        )  # fmt: skip
        return values(out, case.leaves[:2])

    wanted = run()
    untraced()
    assert_equal(run(), wanted)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(trained: str, untraced: Any) -> None:
    case = make_case()
    wanted = case.fused(surrogate=Clip(), aggregate=TokenMean()).loss
    (exact,) = torch.autograd.grad(wanted, getattr(case, trained))
    for name in {"hidden", "weight", "bias"} - {trained}:
        setattr(case, name, getattr(case, name).detach())
    untraced()
    case.fused(surrogate=Clip(), aggregate=TokenMean()).loss.backward()
    assert torch.equal(getattr(case, trained).grad, exact)
    with torch.no_grad():
        assert not case.fused(surrogate=Clip(), aggregate=TokenMean()).loss.requires_grad


def test_gradients_of_fp16_do_not_underflow_before_the_loss_scale(untraced: Any) -> None:
    case = make_case(torch.float16)
    options = {"surrogate": Clip(), "aggregate": Sum(denominator=1e9)}
    wanted = torch.autograd.grad(case.fused(**options).loss * 1e9, case.leaves)
    untraced()
    assert_equal(
        list(torch.autograd.grad(case.fused(**options).loss * 1e9, case.leaves)), list(wanted)
    )


@dataclass(frozen=True)
class Ours(Surrogate):
    """A surrogate of somebody else's, of which the op knows nothing."""

    def __call__(self, tokens: Tokens) -> TokenLosses:
        return TokenLosses(-tokens.ratio * tokens.advantages)


@dataclass(frozen=True)
class Squared(K2):
    """An estimator of somebody else's."""


@pytest.mark.parametrize(
    "options",
    [
        {"surrogate": Ours()},
        {"surrogate": Clip(), "kl": Squared()},
        {"surrogate": Clip(), "kl": RatioWeighted(Squared())},
        {"surrogate": SequenceClip()},  # a sequence may be larger than a chunk
    ],
    ids=lambda options: "-".join(map(repr, options.values())),
)
def test_others_go_through_twice(
    options: dict[str, Any], untraced: Any, products: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 4 * V * (T - 1))
    case = make_case()
    options = {
        "aggregate": TokenMean(),
        "kl_coef": 0.1,
        "ref_logprobs": case.ref_logprobs,
        **options,
    }
    wanted = torch.autograd.grad(case.composed(**options).loss, case.leaves)
    products["logits"].clear()
    untraced()
    found = torch.autograd.grad(case.fused(**options).loss, case.leaves)
    assert sum(products["logits"]) == 24  # of 12 rows
    for grad, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-10, atol=1e-12)  # float64 on both sides


def loss_of(case: Case, **options: Any) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        moved = replace(case, hidden=hidden, weight=weight, bias=bias)
        return moved.fused(aggregate=TokenMean(), **options).loss

    return loss


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # inductor's own
@pytest.mark.parametrize(
    ("backend", "surrogate"),
    [("inductor", Clip()), ("aot_eager", SequenceClip()), ("aot_eager", Ours())],
    ids=repr,
)
def test_compiles_without_a_graph_break_liger_1364(backend: str, surrogate: Surrogate) -> None:
    case = make_case(torch.float32)
    loss = loss_of(case, surrogate=surrogate, entropy_coef=0.1)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    got, wanted = compiled(*case.leaves), loss(*case.leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    grads = (torch.autograd.grad(value * 2, case.leaves) for value in (got, wanted))
    for grad, exact in zip(*grads, strict=True):
        torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-6)


def test_compiles_where_the_compiler_hashes_what_is_called(monkeypatch: Any) -> None:
    """As before torch 2.13, on values that are made under it, and have no fields yet."""

    def is_hashed(self: Any) -> bool:
        return hash(self.value) == 0

    user_defined = torch._dynamo.variables.user_defined.UserDefinedObjectVariable
    monkeypatch.setattr(user_defined, "is_supported_random", is_hashed)
    case = make_case(torch.float32)

    def losses(hidden: Tensor) -> tuple[Tensor, ...]:
        moved = replace(case, hidden=hidden)
        kl = RatioWeighted(K3())
        options = {"kl": kl, "kl_coef": 0.1, "ref_logprobs": case.ref_logprobs}
        parts = {"surrogate": Clip(0.2, 0.3), "aggregate": TokenMean(), **options}
        given = case.ref_logprobs + 0.1, case.advantages
        clipped = clipped_policy_loss(*given, old_logprobs=case.ref_logprobs)
        return moved.fused(**parts).loss, policy_loss(*given, **parts).loss, clipped

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(case.hidden), losses(case.hidden), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_what_compiles_again_liger_1366() -> None:
    case = make_case(torch.float32)
    frames = torch._dynamo.testing.CompileCounter()
    rest = {"surrogate": Clip(), "kl_coef": 0.1, "temperature": 1.0, "denominator": 3.0}

    def loss(surrogate: Clip, kl_coef: float, temperature: Tensor, denominator: Tensor) -> Tensor:
        return case.fused(
            surrogate=surrogate, aggregate=TokenMean(denominator), kl_coef=kl_coef,
            ref_logprobs=case.ref_logprobs, temperature=temperature,
        ).loss  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend=frames)
    for change, count in (
        ({}, 1),
        ({"temperature": 0.9}, 1),
        ({"temperature": 0.7, "denominator": 5.0}, 1),
        ({"surrogate": Clip(0.3)}, 2),
        ({"surrogate": Clip(0.4)}, 3),
        ({"kl_coef": 0.2}, 4),
        ({}, 4),
    ):
        given = rest | change
        numbers = (torch.tensor(given[name]) for name in ("temperature", "denominator"))
        inputs = given["surrogate"], given["kl_coef"], *numbers
        torch.testing.assert_close(compiled(*inputs), loss(*inputs), rtol=1e-6, atol=1e-6)
        assert frames.frame_count == count, change


def test_opcheck() -> None:
    op = getattr(torch.ops, row_checks.NAMESPACE).linear_policy_loss
    hidden, weight = torch.randn(6, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    targets, mask = torch.randint(0, V, (2, 3)), torch.tensor([[True, True, False], [True] * 3])
    words, numbers = take_apart(TokenObjective(Clip(), K3(), 0.0, 0.0))
    for bias, entropy in ((None, False), (torch.randn(V, requires_grad=True), True)):
        rest = (torch.ones(1), torch.tensor([[1.0], [-1.0]]), None, None, None, torch.tensor(0.2))
        needed = [True, True, bias is not None]
        metrics = 5 if entropy else 4
        flags = needed, entropy, False, True, None, 1.0
        torch.library.opcheck(
            op,
            (hidden, weight, bias, targets, mask, None, *rest, words, numbers, 2, metrics, *flags),
        )
        transposed = weight.detach().t().contiguous().t().requires_grad_()  # its gradient is not
        no_row = torch.zeros_like(mask)
        torch.library.opcheck(
            op,
            (
                hidden,
                transposed,
                bias,
                targets,
                no_row,
                None,
                *rest,
                words,
                numbers,
                2,
                metrics,
                *flags,
            ),
        )
