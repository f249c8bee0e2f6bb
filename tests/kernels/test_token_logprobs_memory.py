"""`token_logprobs` under a compiler, and in the memory of the logits."""

import pytest
import torch
from torch import Tensor

import igrpo_kernels.row_checks as row_checks
import igrpo_kernels.row_selection as row_selection
from igrpo_kernels import token_logprobs


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("view", ["whole", "shifted", "strided vocabulary"])
def test_inplace_backward_gives_the_same_bits_in_the_logits_memory(
    view: str, entropy: bool, dtype: torch.dtype
) -> None:
    base = torch.randn(2, 4, 22).to(dtype)
    parts = {
        "whole": ...,
        "shifted": (slice(None), slice(3)),
        "strided vocabulary": (..., slice(0, 22, 2)),
    }
    targets = torch.randint(0, 11, base[parts[view]].shape[:2])
    mask = torch.rand(targets.shape) < 0.7
    mask[0, 0], mask[0, 1] = True, False
    upstream = torch.randn(2, *targets.shape, dtype=row_selection.working_dtype(dtype))
    upstream[:, 1, 1] = 0

    def run(in_place: bool) -> tuple[Tensor, Tensor, Tensor]:
        produced = base.clone().requires_grad_() * 1.0
        logits = produced[parts[view]]
        outputs = token_logprobs(
            logits,
            targets,
            mask=mask,
            temperature=0.8,
            inplace_backward=in_place,
            return_entropy=True,
        )
        (grad,) = torch.autograd.grad(
            outputs if entropy else outputs[:1], logits, list(upstream[: 1 + entropy])
        )
        return produced.detach(), logits.detach(), grad

    _, _, wanted = run(False)
    produced, logits, grad = run(True)
    assert torch.equal(grad, wanted)
    assert grad.data_ptr() == logits.data_ptr()
    beside = torch.ones_like(base, dtype=torch.bool)
    beside[parts[view]] = False
    assert torch.equal(produced[beside], base[beside])


def test_inplace_backward_is_refused_where_the_logits_are_still_needed() -> None:
    leaf, targets = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="inplace_backward would overwrite a leaf"):
        token_logprobs(leaf, targets, inplace_backward=True)
    expanded = (leaf * 1.0)[:1].expand(3, 5)
    with pytest.raises(ValueError, match=r"logits must not be expanded, got shape \[3, 5\] with"):
        token_logprobs(expanded, targets, inplace_backward=True)
    with torch.no_grad():  # no backward will come
        token_logprobs(leaf, targets, inplace_backward=True)
    loss = token_logprobs(leaf * 1.0, targets, inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    capped = torch.tanh(leaf)  # keeps its output for its own backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        token_logprobs(capped, targets, inplace_backward=True).sum().backward()


def compiled(function: object) -> object:
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_compiles_without_a_graph_break_liger_1364(entropy: bool, in_place: bool) -> None:
    logits = torch.randn(2, 3, 11, requires_grad=True)
    targets = torch.randint(0, 11, (2, 3))
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])

    def loss(logits: Tensor) -> Tensor:
        out = token_logprobs(
            logits * 1.0,
            targets,
            mask=mask,
            temperature=0.8,
            inplace_backward=in_place,
            return_entropy=entropy,
        )
        return torch.stack(out).sum() if isinstance(out, tuple) else out.sum()

    (grad,) = torch.autograd.grad(compiled(loss)(logits), logits)  # type: ignore[operator]
    (wanted,) = torch.autograd.grad(loss(logits), logits)
    assert torch.equal(grad, wanted)


def test_temperatures_do_not_recompile_liger_1366() -> None:
    frames = torch._dynamo.testing.CompileCounter()
    logits, targets = torch.randn(3, 11), torch.tensor([0, 1, 2])

    @torch.compile(fullgraph=True, backend=frames)
    def run(logits: Tensor, temperature: Tensor) -> Tensor:
        return token_logprobs(logits, targets, temperature=temperature)

    for value in (1.0, 0.9, 0.7, 0.5):
        got = run(logits, torch.tensor(value))
        wanted = (logits / value).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert frames.frame_count == 1


def test_opcheck() -> None:
    spaces = getattr(torch.ops, row_checks.NAMESPACE)
    op = spaces.token_logprobs
    logits = torch.randn(4, 7, requires_grad=True)
    targets = torch.tensor([0, 3, 6, 2])
    mask = torch.tensor([True, False, True, True])
    for with_entropy in (False, True):
        torch.library.opcheck(op, (logits, targets, mask, torch.ones(1), with_entropy))
        torch.library.opcheck(op, (logits, targets, None, torch.ones(4), with_entropy))
        given = (logits.detach(), targets, mask, torch.ones(1))
        known, upstream = list(op(*given, with_entropy)), [torch.randn(4), torch.randn(4)]
        for backward in (spaces.token_logprobs_backward, spaces.token_logprobs_backward_):
            torch.library.opcheck(
                backward, (*given, known, upstream[0], upstream[1] if with_entropy else None)
            )
