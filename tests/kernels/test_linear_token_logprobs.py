"""`linear_token_logprobs` against float64, plain torch, TRL's kernel and the faults peers had."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

import igrpo_kernels.cpu_head_softmax as cpu_head_softmax
import igrpo_kernels.linear_head as linear_head
import igrpo_kernels.row_checks as row_checks
import igrpo_kernels.row_selection as row_selection
from igrpo_kernels import linear_token_logprobs, token_logprobs
from tests.kernels.head_cases import gradients, head, plain

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(params=["one chunk", "many chunks", "many slices"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with all rows in one chunk, and with each in a chunk, or a slice, of its own."""
    if request.param == "many slices":
        monkeypatch.setattr(row_selection, "CACHE_BYTES", 0)
    if request.param == "many chunks":
        monkeypatch.setattr(cpu_head_softmax, "CHUNK_BYTES", 0)
        monkeypatch.setattr(linear_head, "CAST_ROWS", 6)


@pytest.mark.usefixtures("chunked")
def test_a_loop_in_plain_floats() -> None:
    hidden, weight, bias, targets = head(3, 4, 5)
    got = linear_token_logprobs(
        hidden, weight, targets, bias=bias, temperature=0.8, softcap=1.5, logit_scale=1.2
    )
    for n, (x, target) in enumerate(zip(hidden.tolist(), targets.tolist(), strict=True)):
        logits = []
        for w, b in zip(weight.tolist(), bias.tolist(), strict=True):
            product = sum(a * c for a, c in zip(x, w, strict=True)) + b
            logits.append(1.5 * math.tanh(1.2 * product / 1.5) / 0.8)
        wanted = logits[target] - math.log(sum(math.exp(z) for z in logits))
        assert got[n].item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("softcap", [None, 1.3])
@pytest.mark.parametrize("temperature", [0.7, "per row"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(softcap: float | None, temperature: float | str, masked: bool) -> None:
    hidden, weight, bias, targets = head(6, 3, 7)
    hidden = hidden.detach().view(2, 3, 3).requires_grad_()
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]]) if masked else None
    temperatures = torch.rand(2, 3) + 0.5 if isinstance(temperature, str) else temperature

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_token_logprobs(
            hidden,
            weight,
            targets.view(2, 3),
            mask=mask,
            bias=bias,
            temperature=temperatures,
            softcap=softcap,
            logit_scale=1.1,
            return_entropy=True,
        )

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 16, 7), (9, 33, 507), (3, 8, 50257)])
def test_error_against_float64_is_that_of_plain_torch(
    dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    if shape[2] > 1000 and cpu_head_softmax.CHUNK_BYTES == 0:
        shape = (3, 8, 5027)  # slices of 6 columns take long
    hidden, weight, bias, targets = head(*shape, dtype)
    options = {"temperature": 0.9, "logit_scale": 1.5, "softcap": 20.0}

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        outputs = linear_token_logprobs(
            hidden, weight, targets, bias=bias, return_entropy=True, **options
        )
        return torch.stack(outputs)

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return plain(hidden, weight, targets, bias=bias, **options)

    exact, exact_grads = gradients(theirs, *(leaf.double() for leaf in (hidden, weight, bias)))
    wide, _ = gradients(theirs, *(leaf.float() for leaf in (hidden, weight, bias)))
    _, plain_grads = gradients(theirs, hidden, weight, bias)
    values, grads = gradients(ours, hidden, weight, bias)
    # the values as good as plain torch in fp32, for half precision too
    bound = 2 * (wide - exact).abs().max() + 4 * EPS * exact.abs().max()
    assert (values - exact).abs().max() <= bound
    for grad, plain_grad, exact_grad in zip(grads, plain_grads, exact_grads, strict=True):
        # a chunk of one row is multiplied by a BLAS's loop over V, all rows at once in its blocks:
        # an accumulator of V terms is off by about sqrt(V) roundings
        rounding = (torch.finfo(dtype).eps + EPS * shape[2] ** 0.5) * exact_grad.abs().max()
        bound = 2 * (plain_grad - exact_grad).abs().max() + rounding
        assert (grad - exact_grad).abs().max() <= bound


def test_logits_are_not_rounded_to_bf16() -> None:
    hidden, weight, _, targets = head(32, 256, 1000, torch.bfloat16)
    exact = plain(hidden.double(), weight.double(), targets)[0]
    scale = torch.nn.functional.linear(hidden.double(), weight.double()).abs().max()
    error = (linear_token_logprobs(hidden, weight, targets) - exact).abs().max() / scale
    peer = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 4096)[0]
    assert error < 1e-6
    assert (peer - exact).abs().max() / scale > 1e-4  # what rounding costs


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_trl_agrees(softcap: float | None) -> None:
    hidden, weight, bias, targets = head(6, 12, 101, torch.float32)

    def peer(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        outputs = ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, 0.7, 64, softcap, 1.3, ("entropy",)
        )
        return torch.stack(outputs[:2])

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        outputs = linear_token_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=0.7,
            softcap=softcap,
            logit_scale=1.3,
            return_entropy=True,
        )
        return torch.stack(outputs)

    values, grads = gradients(ours, hidden, weight, bias)
    peer_values, peer_grads = gradients(peer, hidden, weight, bias)
    torch.testing.assert_close(values, peer_values, rtol=1e-5, atol=1e-5)  # fp32 on both sides
    for grad, peer_grad in zip(grads, peer_grads, strict=True):
        torch.testing.assert_close(grad, peer_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_token_logprobs_of_the_logits(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets = head(7, 6, 29, dtype)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    wanted = token_logprobs(logits, targets, temperature=0.5, return_entropy=True)
    got = linear_token_logprobs(
        hidden, weight, targets, bias=bias, temperature=0.5, return_entropy=True
    )
    torch.testing.assert_close(torch.stack(got), torch.stack(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("only", [0, 1, 2])
def test_each_gradient_alone(only: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = list(head(5, 4, 11)[:3])
    targets = torch.randint(0, 11, (5,))
    wanted = torch.autograd.grad(
        plain(leaves[0], leaves[1], targets, bias=leaves[2])[0].sum(), leaves
    )
    frozen = [leaf.detach().requires_grad_(i == only) for i, leaf in enumerate(leaves)]
    products = []
    mm = torch.mm

    def counting_mm(a: Tensor, b: Tensor, **kwargs: object) -> Tensor:
        products.append((tuple(a.shape), tuple(b.shape)))
        return mm(a, b, **kwargs)

    logprobs = linear_token_logprobs(frozen[0], frozen[1], targets, bias=frozen[2])
    monkeypatch.setattr(torch, "mm", counting_mm)
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda acc, a, b: acc.add_(counting_mm(a, b)))
    logprobs.sum().backward()
    torch.testing.assert_close(frozen[only].grad, wanted[only], rtol=1e-10, atol=1e-10)
    assert all(leaf.grad is None for i, leaf in enumerate(frozen) if i != only)
    # the logits again, and one product for hidden or weight: a frozen one costs nothing
    chunks = 1 if cpu_head_softmax.CHUNK_BYTES else 5
    assert len(products) == chunks * (1 if only == 2 else 2)


def test_second_backward_gives_the_same_gradient_quack_209() -> None:
    hidden, weight, bias, targets = head(5, 4, 11)
    leaves = (hidden, weight, bias)
    before = [leaf.detach().clone() for leaf in leaves]
    loss = linear_token_logprobs(hidden, weight, targets, bias=bias).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_an_empty_micro_batch_stays_on_the_graph_trl_7077(shape: tuple[int, ...]) -> None:
    hidden = torch.randn(*shape, 4, requires_grad=True)
    weight = torch.randn(11, 4, requires_grad=True)
    logprobs = linear_token_logprobs(hidden, weight, torch.zeros(shape, dtype=torch.long))
    logprobs.sum().backward()
    assert logprobs.shape == shape
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(11, 4))
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


def test_no_row_counts() -> None:
    hidden, weight, bias, targets = head(3, 4, 5)
    loss = linear_token_logprobs(hidden, weight, targets - 9, mask=torch.zeros(3), bias=bias).sum()
    for grad in torch.autograd.grad(loss, (hidden, weight, bias)):
        assert (grad == 0).all()


@pytest.mark.parametrize("vocabulary", [1, 13])
def test_small_and_extreme(vocabulary: int) -> None:
    hidden = torch.full((2, 4), -100.0, requires_grad=True)  # every logit far below -88
    weight = torch.full((vocabulary, 4), 25.0, requires_grad=True)
    logprobs = linear_token_logprobs(hidden, weight, torch.zeros(2, dtype=torch.long))
    wanted = torch.full((2,), -math.log(vocabulary))
    torch.testing.assert_close(logprobs, wanted, rtol=1e-6, atol=0)
    logprobs.sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.zeros(2, 4), rtol=0, atol=1e-4)


def test_views_that_are_not_contiguous() -> None:
    base = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (5, 3)).t()[:, :-1]
    hidden = base[:, :-1, ::2]
    got = linear_token_logprobs(hidden, weight.t(), targets)
    wanted = plain(hidden, weight.t(), targets)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    pairs = zip(
        torch.autograd.grad(got.sum(), (base, weight)),
        torch.autograd.grad(wanted.sum(), (base, weight)),
        strict=True,
    )
    for grad, exact in pairs:
        torch.testing.assert_close(grad, exact, rtol=1e-12, atol=1e-12)


def test_autocast_casts_as_a_linear_layer_does() -> None:
    hidden, weight, bias, targets = head(5, 16, 31, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs = linear_token_logprobs(hidden, weight, targets, bias=bias)
    rounded = (x.detach().bfloat16() for x in (hidden, weight, bias))
    cast_hidden, cast_weight, cast_bias = rounded
    wanted = linear_token_logprobs(cast_hidden, cast_weight, targets, bias=cast_bias)
    assert torch.equal(logprobs, wanted)
    assert logprobs.dtype == torch.float32
    for leaf, grad in zip(
        (hidden, weight, bias),
        torch.autograd.grad(logprobs.sum(), (hidden, weight, bias)),
        strict=True,
    ):
        assert grad.dtype == leaf.dtype
        assert (grad != 0).any()


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**16))
def test_rows_permute_and_split(rows: int, width: int, vocabulary: int, seed: int) -> None:
    torch.manual_seed(seed)
    hidden, weight, bias, targets = head(rows, width, vocabulary)

    def run(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = linear_token_logprobs(hidden, weight, targets, bias=bias, temperature=0.9)
        return logprobs, torch.autograd.grad(logprobs.square().sum(), weight)[0]

    whole, grad = run(hidden, targets)
    order = torch.randperm(rows)
    permuted, permuted_grad = run(hidden[order], targets[order])
    torch.testing.assert_close(permuted, whole[order], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(permuted_grad, grad, rtol=1e-10, atol=1e-10)
    parts = [run(hidden[i : i + 1], targets[i : i + 1]) for i in range(rows)]
    torch.testing.assert_close(torch.cat([a for a, _ in parts]), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sum(g for _, g in parts), grad, rtol=1e-10, atol=1e-10)


def test_the_same_call_gives_the_same_bits() -> None:
    hidden, weight, bias, targets = head(40, 16, 333, torch.bfloat16)

    def run() -> list[Tensor]:
        logprobs = linear_token_logprobs(hidden, weight, targets, bias=bias)
        return [logprobs, *torch.autograd.grad(logprobs.sum(), (hidden, weight, bias))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_compiles_without_a_graph_break() -> None:
    hidden, weight, bias, targets = head(5, 4, 11, torch.float32)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        outputs = linear_token_logprobs(
            hidden * 1.0, weight, targets, bias=bias, temperature=0.8, return_entropy=True
        )
        return torch.stack(outputs).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = (hidden, weight, bias)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    for grad, exact in zip(got, wanted, strict=True):
        # a compiler is given the temperature as a tensor of fp32, and so rounds it
        torch.testing.assert_close(grad, exact, rtol=1e-6, atol=1e-6)


def test_opcheck() -> None:
    op = getattr(torch.ops, row_checks.NAMESPACE).linear_token_logprobs
    hidden, weight, bias, targets = head(4, 3, 7, torch.float32)
    mask = torch.tensor([True, False, True, True])
    torch.library.opcheck(
        op, (hidden, weight, bias, targets, mask, torch.ones(1), None, 1.0, False)
    )
    torch.library.opcheck(
        op, (hidden, weight.detach(), None, targets, None, torch.ones(4), 2.0, 0.5, True)
    )


def test_bad_input() -> None:
    hidden, weight, bias, targets = head(3, 4, 5, torch.float32)
    with pytest.raises(TypeError, match=r"hidden must be a torch\.Tensor"):
        linear_token_logprobs(None, weight, targets)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="hidden must be a floating-point tensor"):
        linear_token_logprobs(hidden.long(), weight, targets)
    with pytest.raises(TypeError, match="weight must be a floating-point tensor"):
        linear_token_logprobs(hidden, weight.long(), targets)
    with pytest.raises(TypeError, match=r"hidden and weight must have one dtype.*autocast"):
        linear_token_logprobs(hidden.bfloat16(), weight, targets)
    with pytest.raises(TypeError, match="bias must have weight's dtype"):
        linear_token_logprobs(hidden, weight, targets, bias=bias.double())
    with pytest.raises(ValueError, match=r"weight must have shape \[V, H\]"):
        linear_token_logprobs(hidden, weight[0], targets)
    with pytest.raises(ValueError, match=r"weight must have shape \[V, H\] with V >= 1"):
        linear_token_logprobs(hidden, weight[:0], targets)
    with pytest.raises(ValueError, match=r"hidden must have shape \[..., H\] with H = 4"):
        linear_token_logprobs(hidden[:, :3], weight, targets)
    with pytest.raises(ValueError, match=r"bias must have shape \[V\] = \[5\]"):
        linear_token_logprobs(hidden, weight, targets, bias=bias[:4])
    with pytest.raises(ValueError, match=r"targets must have shape of the rows = \[3\]"):
        linear_token_logprobs(hidden, weight, targets[:2])
    with pytest.raises(ValueError, match=r"targets must lie in \[0, V\) = \[0, 5\)"):
        linear_token_logprobs(hidden, weight, targets + 5)
    with pytest.raises(ValueError, match=r"mask must have shape of targets = \[3\]"):
        linear_token_logprobs(hidden, weight, targets, mask=torch.ones(2))
    with pytest.raises(ValueError, match="temperature must be > 0"):
        linear_token_logprobs(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match="softcap must be > 0"):
        linear_token_logprobs(hidden, weight, targets, softcap=0.0)
    with pytest.raises(ValueError, match="logit_scale must be finite"):
        linear_token_logprobs(hidden, weight, targets, logit_scale=float("inf"))
