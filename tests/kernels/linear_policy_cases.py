"""One batch for the tests of `linear_policy_loss`, and what the op is defined to be on it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from igrpo_kernels import (
    FixedLength,
    SequenceMean,
    Sum,
    TokenMean,
    linear_policy_loss,
    linear_token_logprobs,
)
from igrpo_kernels.loss_from_logprobs import PolicyLoss, policy_loss
from igrpo_kernels.surrogates import KlCov
from tests.kernels.loss_oracles import SURROGATES

B, T, H, V = 4, 5, 3, 11
TOKEN_LEVEL = [value for value, _ in SURROGATES.values() if value.scope == "token"]
SEQUENCE_LEVEL = [value for value, _ in SURROGATES.values() if value.scope == "sequence"]
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
