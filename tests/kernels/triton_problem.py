"""Rows of a head for the Triton kernels at small tiles, and what torch in float64 makes of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from igrpo_kernels._triton import exp_product, exp_rows, head_rows, head_softmax
from igrpo_kernels.linear_head import LinearHead
from igrpo_kernels.row_softmax import LogitTransform

SMALL = exp_product.Tile(rows=16, columns=32, depth=16, group=2, warps=4, stages=1)
ONE = torch.ones(1)
TRANSFORMS = {
    "plain": LogitTransform(ONE),
    "temperature": LogitTransform(torch.tensor([0.7]), logit_scale=1.3),
    "temperature per row": LogitTransform(torch.linspace(0.5, 2.0, 20)),
    "cap": LogitTransform(torch.tensor([0.9]), softcap=5.0, logit_scale=1.3),
}
SHAPES = [(1, 1, 1), (2, 1, 4), (5, 7, 4), (20, 70, 20), (16, 64, 16)]  # N, V, H


@pytest.fixture(name="product", params=["fused", "library"], autouse=True)
def both_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    fuses = request.param == "fused"
    monkeypatch.setattr(
        head_softmax,
        "tile_for",
        lambda weight: SMALL if fuses and exp_product.can_describe(weight) else None,
    )
    for module, name, size in (
        (exp_rows, "BLOCK_V", 64),
        (exp_rows, "BLOCK_H", 16),
        (head_rows, "BLOCK_V", 64),
        (head_rows, "BLOCK_H", 16),
        (exp_rows, "TOTALS", exp_rows.TOTALS | {"BLOCK_T": 2, "BLOCK_N": 16, "BLOCK_V": 32}),
    ):
        monkeypatch.setattr(module, name, size)
    kind: str = request.param
    return kind


class Problem:
    """Rows of a head, and what float64 makes of them."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        transform: LogitTransform = TRANSFORMS["plain"],
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        rows, vocabulary, width = shape
        self.transform = transform.take(range(rows))
        self.hidden = torch.randn(rows, width).to(dtype)
        self.weight = (torch.randn(vocabulary, width) * 3 / width**0.5).to(dtype)
        self.bias = torch.randn(vocabulary).to(dtype) if bias else None
        self.targets = torch.randint(0, vocabulary, (rows,))

    def run(self, *, entropy: bool = False, keeps: bool = True, **options: Any) -> Any:
        head = LinearHead(self.weight, self.bias, self.transform, options.pop("shard", None))
        memory = head_softmax.new_memory(head, len(self.hidden), keeps)
        inputs = self.hidden, self.targets, self.transform
        return head_softmax.softmax_of_rows(
            head, memory, *inputs, entropy=entropy, keeps=keeps, **options
        )

    def products(self) -> Tensor:
        products = self.hidden.double() @ self.weight.double().t()
        return products if self.bias is None else products + self.bias.double()

    def exact(self, products: Tensor) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy of each row."""
        logits = products * self.transform.logit_scale
        if self.transform.softcap is not None:
            logits = self.transform.softcap * torch.tanh(logits / self.transform.softcap)
        log_p = (logits / torch.as_tensor(self.transform.temperature)[:, None]).log_softmax(-1)
        terms = torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0)
        return log_p.gather(1, self.targets[:, None])[:, 0], -terms.sum(-1)

    def gradient(self, by_logprob: Tensor, by_entropy: Tensor | None) -> Tensor:
        """The gradient of the products."""
        products = self.products().requires_grad_()
        logprobs, entropy = self.exact(products)
        value = logprobs @ by_logprob.double()
        if by_entropy is not None:
            value = value + entropy @ by_entropy.double()
        return torch.autograd.grad(value, products)[0]


def assert_close(got: Tensor, wanted: Tensor, rtol: float = 1e-5, atol: float = 3e-5) -> None:
    """Compare with float64: to 1e-5 of the logits' scale, which is about 10 here."""
    torch.testing.assert_close(got.double(), wanted.double(), rtol=rtol, atol=atol)


def assert_rows_close(got: Tensor, wanted: Tensor, limit: float = 1e-5) -> None:
    """Compare each row by the size of the largest, so that no row hides among the others.

    Its own size would not do: of an entropy's gradient the terms may cancel in a row.
    """
    assert got.isfinite().all()
    assert got.shape == wanted.shape
    if got.numel():
        errors, sizes = (part.double().norm(dim=-1) for part in (got - wanted, wanted))
        assert errors.max() <= limit * sizes.max().clamp(min=0.1)
