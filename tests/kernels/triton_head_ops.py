"""The ops over the head's kernels against themselves over the twins, in Triton's interpreter.

Run by `test_triton_interpreter.py` in a process of its own, with both products.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from igrpo_kernels import (
    Cispo,
    Clip,
    SequenceClip,
    SequenceMean,
    TokenMean,
    linear_policy_loss,
    linear_token_logprobs,
)
from igrpo_kernels._triton import head_softmax
from tests.kernels.triton_problem import (
    assert_rows_close,
    both_products,  # noqa: F401  # runs by itself
)


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make CPU tensors say that they are CUDA's, from here on."""

    def switch() -> None:
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))

    return switch


SURROGATES = {
    "clip": {"surrogate": Clip(0.2, 0.28)},
    "dual clip, KL and weights": {"surrogate": Clip(0.2, 0.2, dual=2.0), "kl_coef": 0.2},
    "clip with its entropy logged": {"surrogate": Clip(), "return_entropy": True},
    "clip with an entropy bonus": {"surrogate": Clip(), "entropy_coef": 0.1},
    "CISPO": {"surrogate": Cispo(5.0)},
    "GSPO": {"surrogate": SequenceClip(0.2, 0.2)},
}


@pytest.mark.parametrize(
    ("softcap", "masked", "chunks"), [(None, False, 1), (None, True, 3), (4.0, False, 3)]
)
@pytest.mark.parametrize("name", SURROGATES)
def test_linear_policy_loss(
    name: str, softcap: float | None, masked: bool, chunks: int, on_cuda: Any,
    monkeypatch: pytest.MonkeyPatch, product: str,
) -> None:  # fmt: skip
    hidden = torch.randn(4, 5, 8, requires_grad=True)
    weight = torch.randn(70, 8, requires_grad=True)
    bias = torch.randn(70, requires_grad=True)
    mask = (torch.rand(4, 5) < 0.7) if masked else None
    given = {
        "old_logprobs": -4 - torch.rand(4, 5),
        "ref_logprobs": -4 - torch.rand(4, 5) if "KL" in name else None,
        "importance_weights": torch.rand(4, 5) if "weights" in name else None,
        "temperature": torch.linspace(0.5, 1.5, 20).view(4, 5),
        "aggregate": SequenceMean() if masked else TokenMean(),
        "softcap": softcap,
        "bias": bias,
        **SURROGATES[name],
    }
    targets = torch.randint(0, 70, (4, 5))
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.5])

    def run() -> list[Tensor]:
        out = linear_policy_loss(hidden, weight, targets, advantages, mask, **given)
        grads = torch.autograd.grad(out.loss * 2, (hidden, weight, bias))
        return [out.loss.detach(), *grads, *(out.metrics[name] for name in sorted(out.metrics))]

    wanted = run()
    on_cuda()
    width = {"fused": 2, "library": 4}[product]
    monkeypatch.setattr(head_softmax, "CHUNK_BYTES", width * 70 * -(-20 // chunks))
    for value, exact in zip(run(), wanted, strict=True):
        assert_rows_close(value, exact)


@pytest.mark.parametrize("leaf", ["hidden", "weight", "bias"])
def test_each_gradient_alone(leaf: str, on_cuda: Any) -> None:
    leaves = {"hidden": torch.randn(2, 5, 8), "weight": torch.randn(40, 8), "bias": torch.randn(40)}
    leaves[leaf].requires_grad_()
    rest = torch.randint(0, 40, (2, 5)), torch.tensor([1.0, -1.0])

    def run() -> Tensor:
        loss = linear_policy_loss(
            leaves["hidden"], leaves["weight"], *rest, bias=leaves["bias"],
            surrogate=Clip(), aggregate=TokenMean(),
        ).loss  # fmt: skip
        return torch.autograd.grad(loss, leaves[leaf])[0]

    wanted = run()
    on_cuda()
    torch.testing.assert_close(run(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_linear_token_logprobs(softcap: float | None, entropy: bool, on_cuda: Any) -> None:
    hidden = torch.randn(4, 5, 8, requires_grad=True)
    weight = torch.randn(70, 8, requires_grad=True)
    mask = torch.rand(4, 5) < 0.7
    options = {"mask": mask, "softcap": softcap, "temperature": 0.8, "return_entropy": entropy}
    targets = torch.where(mask, torch.randint(0, 70, (4, 5)), -100)
    upstream = torch.randn(2, 4, 5)

    def run() -> list[Tensor]:
        out = linear_token_logprobs(hidden, weight, targets, **options)
        out = out if entropy else (out,)
        value = sum((part * above).sum() for part, above in zip(out, upstream, strict=False))
        return [*(part.detach() for part in out), *torch.autograd.grad(value, (hidden, weight))]

    wanted = run()
    on_cuda()
    for value, exact in zip(run(), wanted, strict=True):
        assert_rows_close(value, exact)


# Bad input, and sizes at the edge


@pytest.mark.parametrize("size", [(1, 8), (40, 1), (1, 1)])
def test_a_vocabulary_or_a_width_of_one(size: tuple[int, int], on_cuda: Any) -> None:
    hidden = torch.randn(2, 3, size[1], requires_grad=True)
    weight = torch.randn(*size, requires_grad=True)
    given = torch.randint(0, size[0], (2, 3)), torch.tensor([1.0, -1.0])

    def run() -> tuple[Tensor, ...]:
        out = linear_policy_loss(hidden, weight, *given, surrogate=Clip(), aggregate=TokenMean())
        return out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))

    wanted = run()
    on_cuda()
    for value, exact in zip(run(), wanted, strict=True):
        assert_rows_close(value, exact)


@pytest.mark.parametrize("case", ["mask", "advantages", "no tokens"])
def test_no_active_row(case: str, on_cuda: Any) -> None:
    length = 0 if case == "no tokens" else 3
    hidden = torch.randn(2, length, 8, requires_grad=True)
    weight = torch.randn(40, 8, requires_grad=True)
    mask = torch.zeros(2, length, dtype=torch.bool) if case == "mask" else None
    advantages = torch.zeros(2) if case == "advantages" else torch.ones(2)
    on_cuda()
    targets = torch.zeros(2, length, dtype=torch.long)
    out = linear_policy_loss(
        hidden, weight, targets, advantages, mask, surrogate=Clip(), aggregate=TokenMean()
    )
    assert out.loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.loss, (hidden, weight)))
