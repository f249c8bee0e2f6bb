"""Log-probs and gradients where they are hard: targets of probability near one, and near zero.

Against mpmath at 60 digits, in each op that takes log-probs.
"""

from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import igrpo_kernels.cpu_head_softmax as cpu_head_softmax
from igrpo_kernels import (
    Reinforce,
    Sum,
    clipped_policy_loss,
    linear_policy_loss,
    linear_token_logprobs,
    token_logprobs,
)
from igrpo_kernels.linear_head import LinearHead

mpmath.mp.dps = 60
DTYPES = [torch.float32, torch.bfloat16]
# Of the dtype that gradients leave in: one rounding, and in bf16 one more of the matrix before it
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2**-8}

# From logits [N, V], which a head gives exactly, and targets: values and gradient of the logits
Op = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def from_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().requires_grad_()
    logprobs = token_logprobs(logits, targets)
    return logprobs, torch.autograd.grad(logprobs.sum(), logits)[0]


def exact_head(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight whose products are the logits: row n is the n-th unit vector."""
    return torch.eye(len(logits), dtype=logits.dtype), logits.t().contiguous().requires_grad_()


def from_hidden(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    hidden, weight = exact_head(logits)
    logprobs = linear_token_logprobs(hidden, weight, targets)
    return logprobs, torch.autograd.grad(logprobs.sum(), weight)[0].t()


def from_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of REINFORCE with advantages of -1 is the sum of the log-probs."""
    hidden, weight = exact_head(logits)
    found = []
    for row in range(len(logits)):
        packed = torch.tensor([0, 1])
        out = linear_policy_loss(
            hidden[row : row + 1],
            weight,
            targets[row : row + 1],
            -torch.ones(1),
            surrogate=Reinforce(),
            aggregate=Sum(),
            cu_seqlens=packed,
        )
        found.append((out.loss.detach(), torch.autograd.grad(out.loss, weight)[0][:, row]))
    values, grads = zip(*found, strict=True)
    return torch.stack(values), torch.stack(grads)


def from_clipped(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """At a ratio of 1 and advantages of -1 the gradient is that of the log-probs."""
    logits = logits.detach().requires_grad_()
    logprobs = token_logprobs(logits, targets)
    given = logprobs.detach().requires_grad_()  # a compiler wants leaves
    losses = clipped_policy_loss(given, -torch.ones(1), cu_seqlens=torch.tensor([0, len(given)]))
    slopes = torch.autograd.grad(losses.sum(), given)
    return logprobs, torch.autograd.grad(logprobs, logits, slopes)[0]


OPS = {"logits": from_logits, "hidden": from_hidden, "loss": from_loss, "clipped": from_clipped}
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def exact(logits: Tensor, targets: Tensor) -> tuple[list[float], list[list[float]]]:
    """Log-probs and their gradients from the definition, in 60 digits."""
    values, grads = [], []
    for row, target in zip(logits.double().tolist(), targets.tolist(), strict=True):
        weights = [mpmath.exp(mpmath.mpf(z)) for z in row]
        total = mpmath.fsum(weights)
        others = mpmath.fsum(w for j, w in enumerate(weights) if j != target)
        values.append(float(mpmath.log(weights[target] / total)))
        grads.append([float(-w / total) for w in weights])
        grads[-1][target] = float(others / total)
    return values, grads


def assert_exact(op: Op, logits: Tensor, targets: Tensor, tolerance: float = 1e-4) -> None:
    """Every log-prob, and every gradient that its dtype can hold, relative to itself."""
    values, grads = op(logits, targets)
    wanted, wanted_grads = exact(logits, targets)
    for value, right in zip(values.tolist(), wanted, strict=True):
        assert value == pytest.approx(right, rel=tolerance, abs=0)
    limit = tolerance + ROUNDING[logits.dtype]
    for row, right_row in zip(grads.tolist(), wanted_grads, strict=True):
        for value, right in zip(row, right_row, strict=True):
            assert value == pytest.approx(right, rel=limit, abs=1e-37)


@each_op
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 300])
def test_a_confident_token_keeps_its_digits(op: Op, dtype: torch.dtype, vocabulary: int) -> None:
    margins = torch.tensor([8.0, 12.0, 15.0, 17.0, 20.0, 30.0, 60.0])
    logits = torch.zeros(len(margins), vocabulary)
    logits[:, 1:] -= torch.rand(vocabulary - 1)
    logits[:, -1] = margins
    targets = torch.full((len(margins),), vocabulary - 1)
    # neither vocabulary nor a common shift of the logits takes digits away
    for shift in (0.0, -64.0, 64.0):
        assert_exact(op, (logits + shift).to(dtype), targets)


def compile_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a compiler have all ops of this file, without a graph break."""
    ops = token_logprobs, linear_token_logprobs, linear_policy_loss, clipped_policy_loss
    torch.compiler.reset()
    for op in ops:
        traced = torch.compile(op, fullgraph=True, backend="aot_eager")
        monkeypatch.setitem(globals(), op.__name__, traced)


@each_op
def test_compiled_ops_keep_the_digits_of_a_confident_token(
    op: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ops(monkeypatch)
    logits = torch.zeros(3, 5)
    logits[:, 4] = torch.tensor([8.0, 16.0, 30.0])
    assert_exact(op, logits.bfloat16(), torch.full((3,), 4))


@each_op
def test_compiled_ops_at_one_column_or_a_width_of_one(
    op: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ops(monkeypatch)
    assert_exact(op, torch.tensor([[2.0]]), torch.tensor([0]))  # and a width of one
    assert_exact(op, torch.tensor([[2.0], [-3.0]]), torch.tensor([0, 0]))
    assert_exact(op, torch.tensor([[2.0, 1.0, -3.0]]), torch.tensor([1]))


@each_op
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_unlikely_token_is_taken_relative_to_the_maximum(op: Op, dtype: torch.dtype) -> None:
    # beyond a probability of e^-41 exponentials relative to the target's logit are left behind, at
    # e^-88 they overflow fp32, and e^-138 is 1e-60
    logits = torch.tensor([0.0, 40.0, 42.0, 87.0, 90.0, 138.0, 1000.0])[:, None].repeat(1, 3)
    logits[:, 0], logits[:, 2] = 0.0, -1.0
    assert_exact(op, logits.to(dtype), torch.zeros(7, dtype=torch.long))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_gradients_of_unlikely_tokens_keep_their_digits(dtype: torch.dtype) -> None:
    # others = e^87 fits fp32; 1e-6 / others is a dozen of its smallest steps, and keeps no digits
    logits, targets = torch.tensor([[0.0, 87.0, 85.0]]).to(dtype), torch.tensor([0])
    hidden, weight = exact_head(logits)
    logprob = linear_token_logprobs(hidden, weight, targets)
    grad = 1e6 * torch.autograd.grad(1e-6 * logprob.sum(), weight)[0].float().t()
    wanted = torch.tensor(exact(logits, targets)[1])
    torch.testing.assert_close(grad, wanted, rtol=1e-5 + ROUNDING[dtype], atol=0)


@each_op
def test_logits_of_minus_infinity(op: Op) -> None:
    low = -torch.inf
    logits = torch.tensor([[0.0, low, 1.0], [low, 2.0, low], [0.0, low, low]])
    values, grads = op_of_infinite(op, logits, torch.tensor([0, 1, 1]))
    assert values.tolist() == pytest.approx([-1.3132616, 0.0, low], rel=1e-6)
    right = [[0.7310586, 0.0, -0.7310586], [0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]]
    torch.testing.assert_close(grads, torch.tensor(right), rtol=1e-6, atol=0)


def op_of_infinite(op: Op, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of -inf come from a bias of -inf where there is a head: -inf * 0 would be NaN."""
    if op is from_logits:
        return op(logits, targets)
    values, grads = [], []
    for row, target in zip(logits, targets, strict=True):
        bias = row.detach().requires_grad_()
        hidden, weight = torch.ones(1, 2), torch.zeros(len(row), 2)
        given = hidden, weight, target[None]
        if op is from_hidden:
            value = linear_token_logprobs(*given, bias=bias).sum()
        else:
            options: dict[str, Any] = {"surrogate": Reinforce(), "aggregate": Sum(), "bias": bias}
            packed = torch.tensor([0, 1])
            value = linear_policy_loss(*given, -torch.ones(1), cu_seqlens=packed, **options).loss
        values.append(value.detach())
        grads.append(torch.autograd.grad(value, bias)[0])
    return torch.stack(values), torch.stack(grads)


@each_op
def test_all_logits_of_minus_infinity_give_nan_as_in_torch(op: Op) -> None:
    values, _ = op_of_infinite(op, torch.full((1, 4), -torch.inf), torch.tensor([2]))
    assert values.isnan().all()


@each_op
@pytest.mark.parametrize("logit", [0.0, -1e4, 3e38])
def test_one_column_is_certain(op: Op, logit: float) -> None:
    values, grads = op(torch.full((2, 1), logit), torch.zeros(2, dtype=torch.long))
    assert values.tolist() == [0.0, 0.0]
    assert (grads == 0).all()


@pytest.mark.parametrize("op", ["logits", "hidden"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_and_its_gradient_against_mpmath(op: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 0.0, 20.0], [0.0, 1.0, 2.0], [50.0, 48.0, 0.0]]).to(dtype)
    targets = torch.tensor([2, 1, 2])  # confident, ordinary, and out of range
    if op == "logits":
        leaf = logits.requires_grad_()
        entropy = token_logprobs(leaf, targets, return_entropy=True)[1]
    else:
        hidden, leaf = exact_head(logits)
        entropy = linear_token_logprobs(hidden, leaf, targets, return_entropy=True)[1]
    (grad,) = torch.autograd.grad(entropy.sum(), leaf)
    grad = grad if op == "logits" else grad.t()
    for n, row in enumerate(logits.double().tolist()):
        total = mpmath.fsum(mpmath.exp(mpmath.mpf(z)) for z in row)
        probs = [mpmath.exp(mpmath.mpf(z)) / total for z in row]
        right = -mpmath.fsum(p * mpmath.log(p) for p in probs)
        assert entropy[n].item() == pytest.approx(float(right), rel=2e-6)
        slopes = [float(-p * (mpmath.log(p) + right)) for p in probs]
        # log p + entropy cancels: off by the rounding of a log-prob of 50, times p
        limit = 1e-5 + ROUNDING[dtype]
        assert grad[n].tolist() == pytest.approx(slopes, rel=limit, abs=4e-6)


def test_rows_out_of_range_alone_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    products_ = LinearHead.products_

    def counting(self: LinearHead, memory: Tensor, hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return products_(self, memory, hidden)

    monkeypatch.setattr(LinearHead, "products_", counting)
    logits = torch.zeros(6, 5)
    targets = torch.zeros(6, dtype=torch.long)
    hidden, weight = exact_head(logits)
    linear_token_logprobs(hidden, weight, targets)
    assert rows == [6]
    rows.clear()
    with torch.no_grad():
        weight[3, 2] = weight[4, 5] = 60.0
    logprobs = linear_token_logprobs(hidden, weight, targets)
    assert rows == [6, 2]
    assert logprobs.tolist() == pytest.approx([-1.6094379, -1.6094379, -60.0] * 2, rel=1e-6)
    rows.clear()
    logprobs.sum().backward()  # whose reference is known
    assert rows == [6]


def test_memory_of_rows_out_of_range_is_theirs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_head_softmax, "LARGEST", 1.0)  # nearly every row is
    hidden = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 7, (3, 3))
    temperature = torch.linspace(0.5, 2, 9, dtype=torch.float64).view(3, 3)

    def run() -> list[Tensor]:
        out = linear_policy_loss(
            hidden.view(3, 3, 4),
            weight,
            targets,
            torch.tensor([1.0, -1.0, 2.0]),
            surrogate=Reinforce(),
            aggregate=Sum(),
            temperature=temperature,
            softcap=3.0,
            entropy_coef=0.3,
        )
        return [out.loss, *out.metrics.values(), *torch.autograd.grad(out.loss, (hidden, weight))]

    relative_to_maximum = run()
    monkeypatch.setattr(cpu_head_softmax, "LARGEST", 1e30)
    for value, wanted in zip(relative_to_maximum, run(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
