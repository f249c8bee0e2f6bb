"""`linear_token_logprobs`: rows that cost nothing, and the sum of the weight's gradient."""

import pytest
import torch
from torch import Tensor

import igrpo_kernels.cpu_head_softmax as cpu_head_softmax
import igrpo_kernels.linear_head as linear_head
from igrpo_kernels import linear_token_logprobs
from tests.kernels.head_cases import gradients, head, plain


def rows_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many rows every matrix product of the head computes."""
    rows: list[int] = []
    products_ = linear_head.LinearHead.products_

    def counting(self: linear_head.LinearHead, buffer: Tensor, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return products_(self, buffer, hidden)

    monkeypatch.setattr(linear_head.LinearHead, "products_", counting)
    return rows


def test_rows_of_no_upstream_gradient_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = head(8, 4, 11)
    rows = rows_computed(monkeypatch)
    logprobs, entropy = linear_token_logprobs(
        hidden, weight, targets, bias=bias, return_entropy=True
    )
    upstream = torch.tensor([1.0, 0, 0, -2.0, 0, 0, 0, 0])
    on_entropy = torch.tensor([0, 0, 0, 1.0, 0, 0.5, 0, 0])
    loss = (logprobs * upstream).sum() + (entropy * on_entropy).sum()
    got = torch.autograd.grad(loss, (hidden, weight, bias))
    assert rows == [8, 3]
    values = plain(hidden, weight, targets, bias=bias)
    loss = (values * torch.stack([upstream, on_entropy])).sum()
    for grad, wanted in zip(got, torch.autograd.grad(loss, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_rows_left_out_cost_nothing_whatever_they_hold(
    junk: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, _, targets = head(6, 4, 11)
    mask = torch.tensor([1, 0, 1, 0, 0, 1])
    with torch.no_grad():
        hidden[mask == 0] = junk
    targets[mask == 0] = -100
    rows = rows_computed(monkeypatch)
    logprobs, entropy = linear_token_logprobs(
        hidden, weight, targets, mask=mask, return_entropy=True
    )
    grads = torch.autograd.grad(logprobs.sum() + entropy.sum(), (hidden, weight))
    assert rows == [3, 3]
    kept = hidden.detach()[mask == 1].requires_grad_()
    values = plain(kept, weight, targets[mask == 1])
    wanted, wanted_weight = torch.autograd.grad(values.sum(), (kept, weight))
    assert (logprobs[mask == 0] == 0).all()
    assert (entropy[mask == 0] == 0).all()
    torch.testing.assert_close(logprobs[mask == 1], values[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grads[0][mask == 1], wanted, rtol=1e-10, atol=1e-10)
    assert (grads[0][mask == 0] == 0).all()
    torch.testing.assert_close(grads[1], wanted_weight, rtol=1e-10, atol=1e-10)


def test_weight_gradient_is_not_summed_in_bf16_axolotl_1601(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, _, targets = head(512, 8, 16, torch.bfloat16)
    monkeypatch.setattr(cpu_head_softmax, "CHUNK_BYTES", 0)  # 512 chunks

    def ours(weight: Tensor) -> Tensor:
        return linear_token_logprobs(hidden.detach(), weight, targets)

    def exact(weight: Tensor) -> Tensor:
        return plain(hidden.detach().double(), weight, targets)[0]

    _, (grad,) = gradients(ours, weight)
    _, (wanted,) = gradients(exact, weight.double())
    one_rounding = torch.finfo(torch.bfloat16).eps / 2 * wanted.abs()
    assert ((grad - wanted).abs() <= one_rounding + 1e-4).all()
