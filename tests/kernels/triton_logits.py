"""The kernels over logits that are given, in Triton's interpreter on CPU tensors.

Run by `test_triton_interpreter.py` in a process of its own: TRITON_INTERPRET has to be set before
triton is first imported. The oracle is torch in float64.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from igrpo_kernels import token_logprobs
from igrpo_kernels._triton import logit_rows as kernels
from igrpo_kernels.row_statistics import LARGEST, RowStatistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE = torch.ones(1)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_V", 128)


class Exact:
    """Log-probs, entropies and their gradient in float64."""

    def __init__(self, logits: Tensor, targets: Tensor, temperature: Tensor = ONE) -> None:
        self.logits = logits.double().requires_grad_()
        log_p = (self.logits / temperature.double()[:, None]).log_softmax(-1)
        self.logprobs = log_p.gather(1, targets[:, None])[:, 0]
        self.entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(-1)

    def gradient(self, by_logprob: Tensor, by_entropy: Tensor | None = None) -> Tensor:
        value = self.logprobs @ by_logprob.double()
        if by_entropy is not None:
            value = value + self.entropy @ by_entropy.double()
        (gradient,) = torch.autograd.grad(value, self.logits)
        return gradient.nan_to_num()


def forward(logits: Tensor, targets: Tensor, temperature: Tensor = ONE) -> RowStatistics:
    return kernels.forward(logits, targets, None, temperature, True)


def backward(
    logits: Tensor, targets: Tensor, found: RowStatistics, *upstream: Tensor | None
) -> Tensor:
    grad = torch.full_like(logits, torch.nan)
    kernels.write_gradient(grad, logits, targets, None, ONE, found, *upstream)
    return grad


def check(got: Tensor, wanted: Tensor, rtol: float = 2e-6, atol: float = 2e-6) -> None:
    """Compare with float64; a few roundings of fp32."""
    torch.testing.assert_close(got.double(), wanted.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("temperature", [ONE, torch.tensor([0.7]), torch.tensor([0.5, 1.0, 2.0])])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 128, 507])
def test_forward_and_backward(
    vocabulary: int, dtype: torch.dtype, entropy: bool, temperature: Tensor
) -> None:
    logits = (torch.randn(3, vocabulary) * 3).to(dtype)
    targets = torch.randint(0, vocabulary, (3,))
    exact = Exact(logits, targets, temperature)
    found = kernels.forward(logits, targets, None, temperature, entropy)
    check(found.logprobs, exact.logprobs)
    assert (found.entropy is None) == (not entropy)
    if found.entropy is not None:
        check(found.entropy, exact.entropy, 1e-5, 1e-5)  # terms as large as the log-prob cancel
    upstream = torch.tensor([1.0, -0.5, 2.0])
    on_entropy = torch.tensor([0.3, -1.0, 0.0]) if entropy else None
    grad = torch.full_like(logits, torch.nan)
    given = targets, None, temperature, found, upstream, on_entropy
    kernels.write_gradient(grad, logits, *given)
    # the interpreter truncates where it should round: one unit in the last place of the dtype
    check(grad, exact.gradient(upstream, on_entropy), torch.finfo(dtype).eps + 1e-5)
    kernels.write_gradient(logits, logits, *given)
    assert torch.equal(logits, grad)


@pytest.mark.parametrize("margin", [8.0, 16.0, 30.0])
def test_confident_tokens_keep_their_digits(margin: float) -> None:
    logits = torch.randn(3, 300)
    targets = torch.tensor([0, 150, 299])
    logits[torch.arange(3), targets] = logits.amax(-1) + margin
    found = forward(logits, targets)
    at = targets[:, None]
    # float64's own log_softmax has lost them at 30 nats
    others = (logits.double() - logits.gather(1, at).double()).exp().scatter(1, at, 0.0).sum(1)
    check(found.logprobs, -others.log1p(), 1e-5, 0.0)
    grad = backward(logits, targets, found, torch.ones(3), None)
    check(grad.gather(1, at)[:, 0], others / (1 + others), 1e-5, 0.0)


@pytest.mark.parametrize("vocabulary", [50257])
def test_vocabulary_not_a_multiple_of_the_block_verl_2656(
    vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BLOCK_V", 4096)
    logits = -30 - torch.rand(3, vocabulary)
    targets = torch.tensor([0, 4096, vocabulary - 1])
    exact, found = Exact(logits, targets), forward(logits, targets)
    assert (found.logprobs <= 0).all()
    check(found.logprobs, exact.logprobs)
    check(torch.as_tensor(found.entropy), exact.entropy)


@pytest.mark.parametrize("level", [-89.0, -1e4, 1e4, -2e38])
def test_running_maximum_that_starts_at_zero(level: float) -> None:
    found = forward(torch.full((2, 300), level), torch.tensor([0, 299]))
    uniform = torch.full((2,), 300.0).log()
    check(found.logprobs, -uniform)
    check(torch.as_tensor(found.entropy), uniform)


@pytest.mark.parametrize("temperature", [ONE, torch.tensor([0.7])])
@pytest.mark.parametrize("offset", [1e4, -1e4, -1e9])
def test_a_common_offset_drops_out(offset: float, temperature: Tensor) -> None:
    # logits over the temperature, rounded before they are subtracted, are off by 1e-3 at 1e4
    logits = torch.randn(4, 131) * 3 + offset
    logits[1:3, 3] = offset + 200.0  # out of range
    targets = torch.tensor([5, 5, 3, 130])
    exact = Exact(logits, targets, temperature)
    found = kernels.forward(logits, targets, None, temperature, True)
    check(found.logprobs, exact.logprobs)
    check(torch.as_tensor(found.entropy), exact.entropy, 1e-5, 1e-5)
    upstream = torch.ones(4), torch.ones(4)
    wanted = exact.gradient(*upstream)
    kernels.write_gradient(logits, logits, targets, None, temperature, found, *upstream)
    check(logits, wanted, 1e-5)


def rows_out_of_range() -> tuple[Tensor, Tensor]:
    """Targets far below the maximum, at -inf and alone; all logits but one, and all of them, -inf.

    In the last block only three columns are used.
    """
    logits = torch.randn(8, 131)
    logits[0, 5] = 88.0  # the sum of exponentials is finite, and out of range
    logits[1, 5] = 300.0  # it is infinite
    logits[2, 3] = -torch.inf
    logits[3, 3:9] = -torch.inf  # others too: -inf minus -inf
    logits[4] = -torch.inf
    logits[4, 3] = 1.0
    logits[5, ::2] = -torch.inf
    logits[6] = -torch.inf
    logits[6, 130] = 1.0
    targets = torch.tensor([3, 3, 3, 3, 3, 3, 130, 3])
    return logits, targets


def test_rows_out_of_range_and_logits_of_minus_infinity() -> None:
    logits, targets = rows_out_of_range()
    exact, found = Exact(logits, targets), forward(logits, targets)
    check(found.logprobs, exact.logprobs)
    check(torch.as_tensor(found.entropy), exact.entropy, 1e-5, 1e-5)
    assert (found.total < LARGEST).all()
    upstream = torch.linspace(-1, 1, 8), torch.linspace(1, 2, 8)
    # of logits at -1e4, which have no weight either, torch knows the gradient
    gradient = Exact(logits.clamp(min=-1e4), targets).gradient(*upstream)
    check(backward(logits, targets, found, *upstream), gradient, 1e-5)


def test_a_row_of_minus_infinity_alone_gives_nan_as_in_torch() -> None:
    found = forward(torch.full((1, 9), -torch.inf), torch.tensor([0]))
    assert found.logprobs.isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_numbers_are_not_hidden(bad: float) -> None:
    logits = torch.randn(2, 300)
    logits[0, 7] = bad
    found = forward(logits, torch.tensor([3, 3]))
    assert not found.logprobs[0].isfinite()
    assert found.logprobs[1].isfinite()


@pytest.mark.parametrize("view", ["shifted", "two axes", "strided vocabulary", "four axes"])
def test_rows_that_are_not_contiguous(view: str) -> None:
    base = torch.randn(2, 4, 9)
    logits = {
        "shifted": base[:, :-1],
        "two axes": base[0, ::2],
        "strided vocabulary": base[..., ::2],
        "four axes": base.view(2, 2, 2, 9)[:, :1],
    }[view]
    walked = kernels.with_row_layout(logits)
    assert view in ("strided vocabulary", "four axes") or walked.data_ptr() == logits.data_ptr()
    flat = logits.reshape(-1, logits.shape[-1])
    targets = torch.randint(0, flat.shape[-1], flat.shape[:1])
    exact, found = Exact(flat, targets), forward(logits, targets)
    check(found.logprobs, exact.logprobs)
    grad = torch.full_like(logits, torch.nan, memory_format=torch.contiguous_format)
    upstream = torch.linspace(1, 2, len(targets))
    kernels.write_gradient(grad, logits, targets, None, ONE, found, upstream, None)
    check(grad.view_as(flat), exact.gradient(upstream))


def test_rows_left_out_and_rows_of_no_gradient_are_written_prime_rl_1525() -> None:
    logits = torch.randn(4, 131)
    logits[1:3] = torch.nan
    mask = torch.tensor([True, False, True, True])
    targets = torch.tensor([5, -100, 7, 130])
    found = kernels.forward(logits, targets, mask, ONE, True)
    assert found.entropy is not None
    assert found.logprobs[1] == found.entropy[1] == 0
    grad = torch.full_like(logits, torch.nan)
    upstream = torch.tensor([1.0, torch.nan, 0.0, 1.0])
    kernels.write_gradient(grad, logits, targets, mask, ONE, found, upstream, None)
    assert (grad[1:3] == 0).all()
    kept = torch.tensor([0, 3])
    exact = Exact(logits[kept], targets[kept])
    check(found.logprobs[kept], exact.logprobs)
    check(found.entropy[kept], exact.entropy)
    check(grad[kept], exact.gradient(torch.ones(2)))


def test_the_gradient_of_the_entropy_alone() -> None:
    logits, targets = torch.randn(2, 131), torch.tensor([5, 130])
    exact, found = Exact(logits, targets), forward(logits, targets)
    upstream = torch.tensor([1.0, -2.0])
    grad = backward(logits, targets, found, None, upstream)
    check(grad, exact.gradient(torch.zeros(2), upstream))


@pytest.mark.parametrize("shape", [(70_000, 3), (2, 66_000, 3)])
def test_rows_are_on_the_axis_of_the_grid_that_has_no_limit_liger_1294(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("logit_rows_fwd_kernel", "logit_rows_bwd_kernel"):
        monkeypatch.setattr(kernels, name, Recorder())
    logits = torch.zeros(shape)
    count = logits[..., 0].numel()
    targets = torch.zeros(count, dtype=torch.long)
    known = kernels.forward(logits, targets, None, ONE, False)
    grad = torch.empty_like(logits)
    kernels.write_gradient(grad, logits, targets, None, ONE, known, torch.ones(count), None)
    assert grids == [(count,)] * 2


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 2), (0, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_op_on_a_cpu_gives_the_same(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base = torch.randn(*shape[:-1], shape[-1] + 1, 131).to(dtype)
    logits = base[..., :-1, :].requires_grad_()
    targets = torch.randint(0, 131, shape)
    mask = torch.rand(shape) < 0.8
    wanted = torch.stack(token_logprobs(logits, targets, mask=mask, return_entropy=True))
    flat, counted = targets.flatten(), mask.flatten()
    known = kernels.forward(logits.detach(), flat, counted, ONE, True)
    got = torch.stack(known.tensors[:2])
    torch.testing.assert_close(got.view_as(wanted), wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(2, flat.numel())
    grad = torch.full_like(logits, torch.nan, memory_format=torch.contiguous_format)
    given = flat, counted, ONE, known, *upstream
    kernels.write_gradient(grad, logits.detach(), *given)
    (exact,) = torch.autograd.grad(wanted, logits, upstream.view_as(wanted))
    rounding = torch.finfo(dtype).eps  # the interpreter truncates
    torch.testing.assert_close(grad, exact, rtol=rounding + 1e-5, atol=rounding / 100 + 1e-6)
    with torch.no_grad():
        beside = base[..., -1, :].clone()
        kernels.write_gradient(logits, logits, *given)
        assert torch.equal(logits, grad)
        assert torch.equal(base[..., -1, :], beside)


def test_float64_is_refused_in_words() -> None:
    with pytest.raises(TypeError, match="float64 has no kernel: cast to float32, or move"):
        forward(torch.zeros(1, 3, dtype=torch.float64), torch.tensor([0]))
