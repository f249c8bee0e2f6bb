"""What an op costs the host: the calls that it hands to torch, which small batches wait for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from igrpo_kernels import Clip, TokenMean, linear_policy_loss, linear_token_logprobs, token_logprobs
from igrpo_kernels.loss_from_logprobs import policy_loss

B, T, H, V = 2, 4, 8, 16


class Calls(TorchDispatchMode):
    """Lists the aten calls, of the backward too, but for the views that only old torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if str(function) not in ("aten.slice.Tensor", "aten.detach.default"):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def batch(dtype: torch.dtype) -> dict[str, Tensor]:
    hidden, weight = torch.randn(B, T, H).to(dtype), torch.randn(V, H).to(dtype)
    targets = torch.randint(0, V, (B, T))
    with torch.no_grad():
        old = linear_token_logprobs(hidden, weight, targets)
    old[0, 0] += 2.0  # a clipped row or two
    old[1, 0] -= 2.0
    mask = torch.ones(B, T)
    mask[0, 3] = 0
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "logits": torch.randn(B, T, V).to(dtype).requires_grad_(),
        "logprobs": (-torch.rand(B, T)).requires_grad_(),
        "targets": targets,
        "advantages": torch.tensor([1.0, -0.5]),
        "mask": mask,
        "old_logprobs": old,
    }


def given(x: dict[str, Tensor], names: str) -> dict[str, Tensor]:
    return {name: x[name] for name in names.split()}


LOSS = {"surrogate": Clip(0.2, 0.28), "aggregate": TokenMean()}
RUNS: dict[str, tuple[int, Callable[[dict[str, Tensor]], Tensor]]] = {
    "token_logprobs": (43, lambda x: token_logprobs(**given(x, "logits targets")).sum()),
    "linear_token_logprobs": (
        52,
        lambda x: linear_token_logprobs(**given(x, "hidden weight targets")).sum(),
    ),
    "linear_policy_loss": (
        98,
        lambda x: (
            linear_policy_loss(
                **given(x, "hidden weight targets advantages mask old_logprobs"), **LOSS
            ).loss
        ),
    ),
    "policy_loss": (
        58,
        lambda x: policy_loss(**given(x, "logprobs advantages mask old_logprobs"), **LOSS).loss,
    ),
}


def calls(run: Callable[[dict[str, Tensor]], Tensor], dtype: torch.dtype) -> list[str]:
    inputs = batch(dtype)
    with Calls() as counted:
        run(inputs).backward()
    return counted.names


@pytest.mark.parametrize("name", RUNS)
def test_forward_and_backward_are_few_calls(name: str) -> None:
    most, run = RUNS[name]
    assert len(calls(run, torch.float32)) <= most
    # half precision casts besides
    assert len(calls(run, torch.bfloat16)) <= most + 12


def test_no_op_is_a_custom_one_without_a_compiler() -> None:
    for _, run in RUNS.values():
        assert all(name.startswith("aten.") for name in calls(run, torch.float32))


@pytest.mark.parametrize("name", ["token_logprobs", "linear_token_logprobs"])
def test_a_forward_reads_nothing_back_but_what_it_checks(name: str) -> None:
    inputs = batch(torch.float32)
    with torch.no_grad(), Calls() as counted:
        RUNS[name][1](inputs)
    # the targets' bounds, and whether a row is out of range; on a GPU these are asserted there
    assert counted.names.count("aten._local_scalar_dense.default") <= 3
    assert not [call for call in counted.names if "nonzero" in call]


def test_rows_are_looked_for_only_where_that_is_asked_for() -> None:
    """What finds rows makes a GPU's host wait, and no CUDA graph can hold it."""
    for skip in (False, True):
        inputs = batch(torch.float32)
        with Calls() as counted:
            loss = linear_policy_loss(
                **given(inputs, "hidden weight targets advantages"), **LOSS, skip_zero_rows=skip
            ).loss
            before = len(counted.names)
            logprobs = linear_token_logprobs(
                **given(inputs, "hidden weight targets"), skip_zero_rows=skip
            )
            (loss + logprobs.sum()).backward()
        assert before > 0
        # on a CPU rows whose gradient is zero are dropped behind the softmax: there are none here
        assert ("aten.nonzero.default" in counted.names) == skip


@pytest.mark.parametrize("masked", [False, True])
def test_rows_that_are_not_skipped_give_the_same_gradients(masked: bool) -> None:
    found = []
    for skip in (False, True):
        torch.manual_seed(0)
        inputs = batch(torch.float64)
        inputs["advantages"] = torch.tensor([0.0, -0.5])
        names = "hidden weight targets advantages old_logprobs" + " mask" * masked
        loss = linear_policy_loss(**given(inputs, names), **LOSS, skip_zero_rows=skip).loss
        leaves = inputs["hidden"], inputs["weight"]
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for value, wanted in zip(*found, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
