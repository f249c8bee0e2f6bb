"""`token_logprobs` against plain floats, float64, plain torch and the faults that peers had."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from igrpo_kernels import token_logprobs

EPS = torch.finfo(torch.float32).eps


def loop(row: list[float], target: int, temperature: float) -> tuple[float, float]:
    """Log-prob and entropy of one row, written from their definitions."""
    total = sum(math.exp(z / temperature) for z in row)
    probs = [math.exp(z / temperature) / total for z in row]
    return math.log(probs[target]), -sum(p * math.log(p) for p in probs)


def plain(
    logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """What a trainer writes without this library; in the dtype of the logits, at least fp32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None]
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.usefixtures("sliced")
def test_a_loop_in_plain_floats() -> None:
    logits = torch.randn(6, 9, dtype=torch.float64)
    targets = torch.randint(0, 9, (6,))
    logprobs, entropy = token_logprobs(logits, targets, temperature=0.7, return_entropy=True)
    wanted = [
        loop(row, int(target), 0.7) for row, target in zip(logits.tolist(), targets, strict=True)
    ]
    torch.testing.assert_close(
        torch.stack([logprobs, entropy], 1),
        torch.tensor(wanted, dtype=torch.float64),
        rtol=1e-12,  # float64 on both sides
        atol=1e-12,
    )


def test_numbers_worked_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([1, 0]), return_entropy=True)
    wanted = torch.tensor([math.log(0.75), math.log(0.5)])
    torch.testing.assert_close(logprobs, wanted, rtol=1e-6, atol=0)
    by_hand = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(entropy, torch.tensor([by_hand, math.log(2.0)]), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("temperature", [1.0, 0.6, "per row"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(temperature: float | str, masked: bool) -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 5, (2, 3))
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]]) if masked else None
    spread = torch.tensor([[0.7, 1.0, 1.3], [0.5, 1.1, 0.9]])
    temperatures = spread if isinstance(temperature, str) else temperature

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(
            logits, targets, mask=mask, temperature=temperatures, return_entropy=True
        )

    assert torch.autograd.gradcheck(both, logits)


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 507, 50257])
def test_error_against_float64_is_that_of_plain_torch(dtype: torch.dtype, vocabulary: int) -> None:
    logits = (torch.randn(4, vocabulary) * 4).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (4,))
    upstream = torch.randn(2, 4)

    def run(function: object, logits: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        outputs = torch.stack(function(leaf))  # type: ignore[operator]
        (outputs * upstream).sum().backward()
        assert leaf.grad is not None
        return outputs.detach().double(), leaf.grad.double()

    def ours(logits: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(logits, targets, temperature=0.9, return_entropy=True)

    def theirs(logits: Tensor) -> tuple[Tensor, Tensor]:
        return plain(logits, targets, 0.9)

    exact, exact_grad = run(theirs, logits.double())
    values, grad = run(ours, logits)
    plain_values, plain_grad = run(theirs, logits)
    # twice as wrong as plain torch at most, plus two roundings of the largest value
    bound = 2 * (plain_values - exact).abs().max() + 4 * EPS * exact.abs().max() + EPS
    assert (values - exact).abs().max() <= bound
    rounding = torch.finfo(dtype).eps * exact_grad.abs().max()
    bound = 2 * (plain_grad - exact_grad).abs().max() + 2 * rounding + EPS
    assert (grad - exact_grad).abs().max() <= bound


def test_vocabulary_not_a_multiple_of_the_block_verl_2656() -> None:
    logits = -30 - torch.rand(3, 50257)
    targets = torch.tensor([0, 25000, 50256])
    logprobs = token_logprobs(logits, targets)
    assert (logprobs <= 0).all()
    torch.testing.assert_close(logprobs, plain(logits, targets)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", [-89.0, -1e4, 1e4, -3e38])
def test_running_maximum_that_starts_at_zero(level: float) -> None:
    logits = torch.full((2, 300), level, requires_grad=True)
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 299]), return_entropy=True)
    uniform = torch.full((2,), math.log(300))
    torch.testing.assert_close(logprobs, -uniform, rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, uniform, rtol=1e-6, atol=0)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    wanted = torch.full((2, 300), -1 / 300)
    wanted[0, 0] += 1
    wanted[1, 299] += 1
    # the entropy is flat at its maximum, up to the rounding of log p + entropy
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-5, atol=1e-7)


def test_logits_of_minus_infinity_have_probability_zero() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf, 2.0, -torch.inf]])
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 1]), return_entropy=True)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    two = torch.tensor([[0.0, 1.0]], requires_grad=True)
    wanted, wanted_entropy = plain(two, torch.tensor([0]))
    (wanted + wanted_entropy).sum().backward()
    assert two.grad is not None
    torch.testing.assert_close(logprobs, torch.cat([wanted, torch.zeros(1)]), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        entropy, torch.cat([wanted_entropy, torch.zeros(1)]), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(logits.grad[0, [0, 2]], two.grad[0], rtol=1e-6, atol=1e-7)
    assert logits.grad[0, 1] == 0
    assert (logits.grad[1] == 0).all()


def test_target_of_probability_zero() -> None:
    logits = torch.tensor([[0.0, -torch.inf]], requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([1]))
    logprobs.sum().backward()
    assert logprobs.item() == -torch.inf
    assert logits.grad is not None
    assert logits.grad.tolist() == [[-1.0, 1.0]]


def test_row_of_minus_infinity_is_nan_as_in_torch() -> None:
    logits = torch.full((2, 4), -torch.inf)
    logits[1] = 0
    logprobs = token_logprobs(logits, torch.tensor([0, 0]))
    assert logprobs[0].isnan()
    assert logprobs[1] == pytest.approx(-math.log(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logprobs_leave_in_fp32_verl_5662(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 40).to(dtype).requires_grad_()
    targets = torch.tensor([3, 4, 5])
    logprobs, entropy = token_logprobs(logits, targets, return_entropy=True)
    assert (logprobs.dtype, entropy.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(logprobs, plain(logits, targets)[0], rtol=1e-6, atol=1e-6)
    logprobs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3)])
def test_gradients_survive_any_leading_shape_verl_6913(shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 6, shape)
    logprobs = token_logprobs(logits, targets)
    assert logprobs.shape == shape
    (grad,) = torch.autograd.grad(logprobs.sum(), logits)
    (wanted,) = torch.autograd.grad(plain(logits, targets)[0].sum(), logits)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("view", ["shifted", "transposed", "strided", "expanded"])
def test_views_that_are_not_contiguous(view: str) -> None:
    base = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    logits = {
        "shifted": lambda: base[:, :-1],
        "transposed": lambda: base.transpose(0, 2),
        "strided": lambda: base[..., ::2],
        "expanded": lambda: base[:1].expand(5, 4, 8),
    }[view]()
    targets = torch.randint(0, logits.shape[-1], logits.shape[:-1])
    upstream = torch.randn(targets.shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad((token_logprobs(logits, targets) * upstream).sum(), base)
    (wanted,) = torch.autograd.grad((plain(logits, targets)[0] * upstream).sum(), base)
    torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_rows_left_out_are_written_and_cost_no_gradient_prime_rl_1525(junk: float) -> None:
    logits = torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    logits[mask == 0] = junk
    logits.requires_grad_()
    targets = torch.tensor([[0, 1, -100], [-100, 2, 4]])
    temperatures = torch.where(mask == 1, 0.5, torch.nan)
    logprobs, entropy = token_logprobs(
        logits, targets, mask=mask, temperature=temperatures, return_entropy=True
    )
    (logprobs.sum() + entropy.sum()).backward()
    assert (logprobs[mask == 0] == 0).all()
    assert (entropy[mask == 0] == 0).all()
    assert logits.grad is not None
    assert (logits.grad[mask == 0] == 0).all()
    wanted = plain(logits.detach()[mask == 1], targets[mask == 1], 0.5)[0]
    torch.testing.assert_close(logprobs[mask == 1], wanted, rtol=1e-6, atol=1e-6)


def test_second_backward_gives_the_same_gradient_quack_209() -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    before = logits.detach().clone()
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 1, 2, 3]), return_entropy=True)
    loss = logprobs.sum() + entropy.sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)
    assert torch.equal(logits, before)


def test_each_output_has_its_own_gradient() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 8])
    outputs = token_logprobs(logits, targets, return_entropy=True)
    for output, wanted in zip(outputs, plain(logits, targets), strict=True):
        (grad,) = torch.autograd.grad(output.sum(), logits, retain_graph=True)
        (exact,) = torch.autograd.grad(wanted.sum(), logits, retain_graph=True)
        torch.testing.assert_close(grad, exact, rtol=1e-12, atol=1e-12)


def test_rewarded_token_becomes_likelier() -> None:
    logits = torch.randn(1, 9, requires_grad=True)
    token_logprobs(logits, torch.tensor([4])).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 4] > 0
    assert (logits.grad[0, [0, 1, 2, 3, 5, 6, 7, 8]] < 0).all()
    assert logits.grad.sum() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_an_empty_batch_stays_on_the_graph_trl_7077(shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 5, requires_grad=True)
    logprobs, entropy = token_logprobs(
        logits, torch.zeros(shape, dtype=torch.long), return_entropy=True
    )
    assert logprobs.shape == entropy.shape == shape
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape


def test_nothing_counts() -> None:
    logits = torch.full((2, 5), torch.nan, requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([-1, 9]), mask=torch.zeros(2))
    logprobs.sum().backward()
    assert logprobs.tolist() == [0.0, 0.0]
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_targets_of_any_integer_dtype() -> None:
    logits = torch.randn(3, 5)
    wanted = token_logprobs(logits, torch.tensor([0, 4, 2]))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(token_logprobs(logits, torch.tensor([0, 4, 2], dtype=dtype)), wanted)


@pytest.mark.usefixtures("sliced")
@settings(max_examples=40)
@given(st.data())
def test_shift_permutation_and_neighbors(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 5))
    vocabulary = data.draw(st.integers(1, 20))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    logits = torch.randn(rows, vocabulary, dtype=torch.float64) * 3
    targets = torch.randint(0, vocabulary, (rows,))
    base = torch.stack(token_logprobs(logits, targets, return_entropy=True))

    shifted = token_logprobs(logits + torch.randn(rows, 1) * 50, targets, return_entropy=True)
    torch.testing.assert_close(torch.stack(shifted), base, rtol=1e-10, atol=1e-10)

    order = torch.randperm(vocabulary)
    permuted = token_logprobs(logits[:, order], order.argsort()[targets], return_entropy=True)
    torch.testing.assert_close(torch.stack(permuted), base, rtol=1e-12, atol=1e-12)

    alone = [token_logprobs(logits[i], targets[i], return_entropy=True) for i in range(rows)]
    one_by_one = torch.stack([torch.stack(pair) for pair in alone], 1)
    torch.testing.assert_close(one_by_one, base, rtol=1e-12, atol=1e-12)


def test_the_same_call_gives_the_same_bits() -> None:
    logits = torch.randn(16, 999).bfloat16().requires_grad_()
    targets = torch.randint(0, 999, (16,))

    def run() -> tuple[Tensor, Tensor]:
        logprobs = token_logprobs(logits, targets)
        return logprobs, torch.autograd.grad(logprobs.sum(), logits)[0]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan"), float("inf")])
def test_temperature_zero_is_a_clear_error_miles_2686(temperature: float) -> None:
    logits, targets = torch.randn(2, 5), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="temperature must be"):
        token_logprobs(logits, targets, temperature=temperature)
    with pytest.raises(ValueError, match=r"temperature must be >= 1\.18e-38 and finite on rows"):
        token_logprobs(logits, targets, temperature=torch.tensor([1.0, temperature]))


def test_bad_input() -> None:
    logits, targets = torch.randn(2, 5), torch.tensor([0, 1])
    with pytest.raises(TypeError, match="logits must be a floating-point tensor, got a int64"):
        token_logprobs(targets, targets)
    with pytest.raises(TypeError, match=r"logits must be a torch\.Tensor"):
        token_logprobs([[0.0]], targets)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="targets must be an integer tensor"):
        token_logprobs(logits, targets.float())
    with pytest.raises(ValueError, match=r"targets must have shape of the rows = \[2\], got \[1\]"):
        token_logprobs(logits, targets[:1])
    with pytest.raises(ValueError, match=r"logits must have shape \[..., V\] with V >= 1"):
        token_logprobs(torch.randn(2, 0), targets)
    with pytest.raises(ValueError, match=r"logits must have shape \[..., V\] with V >= 1"):
        token_logprobs(torch.tensor(1.0), targets)
    with pytest.raises(ValueError, match=r"mask must have shape of targets = \[2\]"):
        token_logprobs(logits, targets, mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"temperature must have shape of targets"):
        token_logprobs(logits, targets, temperature=torch.ones(3))
    with pytest.raises(TypeError, match="temperature must be a number"):
        token_logprobs(logits, targets, temperature="hot")  # type: ignore[call-overload]


@pytest.mark.parametrize("target", [-100, -1, 5])
def test_targets_outside_the_vocabulary(target: int) -> None:
    logits, targets = torch.randn(2, 5), torch.tensor([0, target])
    with pytest.raises(ValueError, match=r"targets must lie in \[0, V\) = \[0, 5\) on rows that"):
        token_logprobs(logits, targets)
    counted = token_logprobs(logits, targets, mask=torch.tensor([1, 0]))
    assert counted[1] == 0
