"""The clipped-ratio kernel over tokens and the upstream scalar's, in Triton's interpreter.

Run by `test_triton_interpreter.py` in a process of its own. The oracle is the composed twin.
"""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from igrpo_kernels import Clip, FixedLength, SequenceMean, Sum, TokenMean, clipped_policy_loss
from igrpo_kernels._triton import clip_terms as kernels
from igrpo_kernels._triton import rescale
from igrpo_kernels.loss_from_logprobs import policy_loss

AGGREGATES = [SequenceMean(), TokenMean(), FixedLength(7), Sum()]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make CPU tensors say that they are CUDA's, from here on."""
    monkeypatch.setattr(kernels, "BLOCK", 16)

    def switch() -> None:
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))

    return switch


def tokens(shape: tuple[int, int], masked: bool) -> dict[str, Any]:
    """Log-probs on every side of the clip and beyond the largest log-ratio; junk where masked."""
    mask = torch.rand(shape) < 0.7 if masked else torch.ones(shape, dtype=torch.bool)
    drawn = -torch.rand(shape)
    old, ref = drawn + torch.randn(shape), drawn + torch.randn(shape)
    if drawn.numel() > 3:
        old.view(-1)[0] = -40.0
        ref.view(-1)[1] = 40.0
        mask.view(-1)[:2] = True
    junk = {name: torch.where(mask, values, torch.nan) for name, values in
            {"logprobs": drawn, "old_logprobs": old, "ref_logprobs": ref}.items()}  # fmt: skip
    return {**junk, "mask": mask if masked else None}


def assert_same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=2e-6, atol=2e-6)


def run(given: dict[str, Any], **options: Any) -> list[Tensor]:
    logprobs = given["logprobs"].clone().requires_grad_()
    out = policy_loss(**{**given, "logprobs": logprobs}, **options)
    (grad,) = torch.autograd.grad(out.loss * 3.0, logprobs)
    return [out.loss.detach(), grad, *(out.metrics[name] for name in sorted(out.metrics))]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("aggregate", AGGREGATES, ids=repr)
@pytest.mark.parametrize("clip", [Clip(0.2, 0.28), Clip(0.2, 0.2, dual=3.0), Clip(1.5, 0.0)])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7, 9)])
def test_policy_loss(
    shape: tuple[int, int], clip: Clip, aggregate: Any, packed: bool, on_cuda: Any
) -> None:
    given = tokens(shape, masked=shape != (1, 1))
    given |= {
        "advantages": torch.randn(shape[0]),
        "importance_weights": torch.rand(shape if packed else (shape[0], 1)),
        "kl_coef": 0.3,
    }
    if packed:
        for name in ("logprobs", "old_logprobs", "ref_logprobs", "mask", "importance_weights"):
            given[name] = None if given[name] is None else given[name].flatten()
        given["cu_seqlens"] = torch.arange(shape[0] + 1) * shape[1]
    options = {"surrogate": clip, "aggregate": aggregate}
    wanted = run(given, **options)
    on_cuda()
    got = run(given, **options)
    for value, exact in zip(got, wanted, strict=True):
        assert_same(value, exact)


@pytest.mark.parametrize(
    ("old", "ref", "importance", "each"), list(product([False, True], repeat=4))
)
def test_what_is_not_given(
    old: bool, ref: bool, importance: bool, each: bool, on_cuda: Any
) -> None:
    given = tokens((4, 6), masked=True)
    given["advantages"] = torch.randn((4, 6) if each else (4, 1))
    if not old:
        given["old_logprobs"] = None
    if not ref:
        given["ref_logprobs"] = None
    if importance:
        given["importance_weights"] = torch.rand(4, 6)
    options = {"surrogate": Clip(), "aggregate": SequenceMean()}
    wanted = run(given, **options)
    on_cuda()
    for value, exact in zip(run(given, **options), wanted, strict=True):
        assert_same(value, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_log_probs(dtype: torch.dtype, on_cuda: Any) -> None:
    given = tokens((4, 6), masked=True) | {"advantages": torch.randn(4)}
    given |= {name: given[name].to(dtype) for name in ("logprobs", "old_logprobs", "ref_logprobs")}
    options = {"surrogate": Clip(), "aggregate": TokenMean()}
    wanted = run(given, **options)
    on_cuda()
    got = run(given, **options)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    for value, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_no_tokens(shape: tuple[int, int], on_cuda: Any) -> None:
    given: dict[str, Any] = {"logprobs": torch.empty(shape), "advantages": torch.ones(shape[0])}
    options = {"surrogate": Clip(), "aggregate": TokenMean()}
    wanted = run(given, **options)
    on_cuda()
    for value, exact in zip(run(given, **options), wanted, strict=True):
        assert_same(value, exact)


def test_a_log_prob_that_is_not_a_number_is_not_hidden(on_cuda: Any) -> None:
    given = tokens((2, 3), masked=False) | {"advantages": torch.ones(2)}
    given["logprobs"][1, 1] = torch.nan
    on_cuda()
    out = policy_loss(**given, surrogate=Clip(), aggregate=TokenMean())
    assert out.loss.isnan()


@pytest.mark.parametrize("log_ratio", [-1.0, 0.0, 2.0])
def test_an_advantage_that_is_not_a_number_is_not_hidden(log_ratio: float, on_cuda: Any) -> None:
    given = {"logprobs": torch.tensor([[-2.0]]), "old_logprobs": torch.tensor([[-2.0 - log_ratio]])}
    given["advantages"] = torch.tensor([torch.nan])
    on_cuda()
    loss, grad, *_ = run(given, surrogate=Clip(dual=3.0), aggregate=TokenMean())
    assert loss.isnan()
    assert grad.isnan()


@pytest.mark.parametrize("ref", [-torch.inf, torch.nan])
def test_a_reference_for_the_metrics_alone_leaves_the_loss_finite(ref: float, on_cuda: Any) -> None:
    given = tokens((2, 3), masked=False) | {"advantages": torch.ones(2)}
    given["ref_logprobs"][1, 1] = ref
    options = {"surrogate": Clip(), "aggregate": TokenMean()}
    wanted = run(given, **options)[:2]
    on_cuda()
    for value, exact in zip(run(given, **options), wanted, strict=False):
        assert_same(value, exact)
        assert value.isfinite().all()


NUMBERS = [0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 1e-40]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter's sums
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("clip", [Clip(0.2, 0.28), Clip(0.2, 0.2, dual=3.0), Clip(1.5, 0.0)])
def test_what_is_not_finite_leaves_what_float64_leaves(
    clip: Clip, kl_coef: float, masked: bool, on_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 2**14)
    axes = {
        "logprobs": [0.0, -1.0, -torch.inf, torch.nan, -1e30],
        "old_logprobs": NUMBERS,
        "ref_logprobs": NUMBERS,
        "advantages": NUMBERS,
        "importance_weights": [0.0, 1.0, torch.inf, torch.nan],
    }
    columns = torch.cartesian_prod(*map(torch.tensor, axes.values())).t()
    given = {name: values[None] for name, values in zip(axes, columns, strict=True)}
    mask = torch.arange(columns.shape[1])[None] % 3 > 0 if masked else None

    def run_in(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        inputs = {name: values.to(dtype) for name, values in given.items()}
        logprobs = inputs["logprobs"].requires_grad_()
        options: dict[str, Any] = {"surrogate": clip, "aggregate": Sum(), "kl_coef": kl_coef}
        (grad,) = torch.autograd.grad(policy_loss(**inputs, mask=mask, **options).loss, logprobs)
        bounds = {"clip_low": clip.low, "clip_high": clip.high, "dual_clip": clip.dual}
        losses = clipped_policy_loss(
            logprobs, inputs["advantages"], mask, old_logprobs=inputs["old_logprobs"], **bounds
        )
        return grad.float(), losses.detach().float()

    wanted = run_in(torch.float64)
    on_cuda()
    for value, exact in zip(run_in(torch.float32), wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_a_second_backward_gives_the_same_quack_209(on_cuda: Any) -> None:
    given = tokens((2, 3), masked=False) | {"advantages": torch.ones(2)}
    logprobs = given["logprobs"].requires_grad_()
    on_cuda()
    out = policy_loss(**given, surrogate=Clip(), aggregate=TokenMean())
    first = torch.autograd.grad(out.loss, logprobs, torch.tensor(3.0), retain_graph=True)[0].clone()
    second = torch.autograd.grad(out.loss, logprobs, torch.tensor(3.0))[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1025), (0, 3)])
def test_clipped_policy_loss(shape: tuple[int, int], dual: float | None, on_cuda: Any) -> None:
    given = tokens(shape, masked=True)
    del given["ref_logprobs"]
    given["advantages"] = torch.randn(shape[0])
    upstream = torch.randn(shape)

    def losses_and_gradient() -> list[Tensor]:
        logprobs = given["logprobs"].clone().requires_grad_()
        bounds = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": dual}
        losses = clipped_policy_loss(**{**given, "logprobs": logprobs}, **bounds)
        return [losses.detach(), torch.autograd.grad(losses, logprobs, upstream)[0]]

    wanted = losses_and_gradient()
    on_cuda()
    for value, exact in zip(losses_and_gradient(), wanted, strict=True):
        assert_same(value, exact)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_masked_slot_has_no_gradient_whatever_comes_from_above(bad: float, on_cuda: Any) -> None:
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    on_cuda()
    losses = clipped_policy_loss(logprobs, torch.ones(1), mask)
    (grad,) = torch.autograd.grad(losses, logprobs, torch.tensor([[1.0, bad]]))
    assert grad.tolist() == [[-1.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 1000])
@pytest.mark.parametrize("scalar", [1.0, -2.5, 0.0, torch.nan])
def test_the_upstream_scalar(
    scalar: float, count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rescale, "BLOCK", 64)
    monkeypatch.setattr(rescale, "PROGRAMS", 3)
    values = torch.randn(count).to(dtype)
    wanted = (values.float() * scalar).to(dtype)
    got = rescale.rescale_(values, torch.tensor(scalar))
    assert got.data_ptr() == values.data_ptr()
    # the interpreter truncates where it should round
    torch.testing.assert_close(got, wanted, rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)


def test_an_upstream_scalar_of_one_writes_nothing() -> None:
    # a value that no multiplication gives back: what stands there is not touched
    values = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    rescale.rescale_(values, torch.ones(()))
    assert values.view(torch.int32).item() == 0x7F800001
