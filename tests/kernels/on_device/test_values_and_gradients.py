"""Each op against float64 torch, its output and every gradient, at sizes that GPUs meet."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from igrpo_kernels import (
    Clip,
    Reinforce,
    SequenceMean,
    Sum,
    TokenMean,
    clipped_policy_loss,
    linear_policy_loss,
    linear_token_logprobs,
    token_logprobs,
)

Close = Callable[..., None]
# (rows, vocabulary) or (rows, vocabulary, width): on a GPU, and elsewhere
LOGITS = {
    "more rows than a grid's second axis": ((65_540, 507), (20, 37)),
    "Qwen": ((2048, 151_936), (9, 507)),
    "a quarter million": ((1024, 262_144), (3, 1024)),
    "GPT-2": ((300, 50_257), (6, 263)),
    "seven": ((33, 7), (9, 7)),
}
HEADS = {
    "many rows": ((65_536, 507, 64), (24, 37, 5)),
    "Qwen": ((2056, 151_936, 1024), (16, 263, 16)),
    "GPT-2": ((512, 50_257, 4096), (8, 131, 8)),
    "seven": ((32, 7, 8), (16, 7, 8)),
    # more than 2^31 weights
    "a quarter million": ((264, 262_147, 8192), (8, 515, 24)),
}
LINEAR_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"temperature": 0.7, "softcap": 20.0, "logit_scale": 1.3},
}


def exact_scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, targets[..., None]).squeeze(-1), entropy


@pytest.mark.parametrize("upstream_of", ["log-prob", "entropy", "both"])
@pytest.mark.parametrize("name", LOGITS)
def test_token_logprobs(
    place: Any, dtype: torch.dtype, assert_close: Close, name: str, upstream_of: str
) -> None:
    rows, vocabulary = place.pick(*LOGITS[name])
    logits = (3 * place.normal(rows, vocabulary, dtype=dtype)).requires_grad_()
    targets = place.below(vocabulary, rows)
    got = token_logprobs(logits, targets, temperature=0.9, return_entropy=True)
    exact = logits.detach().double().requires_grad_()
    wanted = exact_scores(exact / 0.9, targets)
    for mine, other in zip(got, wanted, strict=True):
        assert_close(mine, other)
    chosen = {"log-prob": [0], "entropy": [1], "both": [0, 1]}[upstream_of]
    upstream = [place.normal(rows, seed=1 + i) for i in chosen]
    (grad,) = torch.autograd.grad([got[i] for i in chosen], logits, upstream)
    doubled = [values.double() for values in upstream]
    (reference,) = torch.autograd.grad([wanted[i] for i in chosen], exact, doubled)
    assert_close(grad, reference, gradient=True)


def test_targets_far_below_the_maximum(place: Any, dtype: torch.dtype, assert_close: Close) -> None:
    rows, vocabulary = place.pick(*LOGITS["Qwen"])
    logits = 3 * place.normal(rows, vocabulary, dtype=dtype)
    logits[::2, 7], logits[:, 5] = 200.0, -torch.inf  # every other row is done again
    targets = place.below(vocabulary - 8, rows) + 8
    got = token_logprobs(logits.requires_grad_(), targets, return_entropy=True)
    # of logits at -1e4, which have no weight either, torch knows the gradient
    exact = logits.detach().double().clamp(min=-1e4).requires_grad_()
    wanted = exact_scores(exact, targets)
    assert (wanted[0] < -150).sum() == len(logits[::2])
    for mine, other in zip(got, wanted, strict=True):
        assert_close(mine, other)
    (grad,) = torch.autograd.grad(got[0].sum(), logits)
    (reference,) = torch.autograd.grad(wanted[0].sum(), exact)
    assert_close(grad, reference, gradient=True)


def test_logits_past_two_billion_elements(place: Any, assert_close: Close) -> None:
    rows, vocabulary = place.pick((16_500, 131_073), (8, 131))
    assert not place.real or rows * vocabulary > 2**31
    logits = place.normal(1, rows + 1, vocabulary, dtype=torch.bfloat16)[:, :-1].requires_grad_()
    targets = place.below(vocabulary, 1, rows)
    got = token_logprobs(logits, targets)
    (grad,) = torch.autograd.grad(got.sum(), logits)
    for some in (slice(0, 4), slice(rows // 2, rows // 2 + 4), slice(rows - 4, rows)):
        exact = logits[:, some].detach().double().requires_grad_()
        wanted, _ = exact_scores(exact, targets[:, some])
        assert_close(got[:, some], wanted)
        (reference,) = torch.autograd.grad(wanted.sum(), exact)
        assert_close(grad[:, some], reference, gradient=True)


@pytest.mark.parametrize("name", LOGITS)
def test_inplace_backward_of_token_logprobs(place: Any, dtype: torch.dtype, name: str) -> None:
    rows, vocabulary = place.pick(*LOGITS[name])
    base = place.normal(2, rows // 2 + 1, vocabulary, dtype=dtype).requires_grad_()
    targets = place.below(vocabulary, 2, rows // 2)
    mask = targets % 3 != 0
    upstream = place.normal(2, rows // 2, seed=1)

    def run(in_place: bool) -> tuple[Tensor, Tensor]:
        logits = (base * 1.0)[:, :-1]
        out = token_logprobs(logits, targets, mask=mask, inplace_backward=in_place)
        return logits.detach(), torch.autograd.grad(out, logits, upstream)[0]

    _, wanted = run(in_place=False)
    logits, grad = run(in_place=True)
    assert grad.data_ptr() == logits.data_ptr()
    assert torch.equal(grad, wanted)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("advantage_of", ["sequence", "token"])
def test_clipped_policy_loss(
    place: Any, assert_close: Close, layout: str, advantage_of: str
) -> None:
    sequences, tokens = place.pick((256, 4097), (3, 411))
    logprobs = -place.normal(sequences, tokens).abs()
    old = logprobs + 0.3 * place.normal(sequences, tokens, seed=1)
    mask = place.normal(sequences, tokens, seed=2) > -1
    shape = (sequences, tokens if advantage_of == "token" else 1)
    advantages = place.normal(*shape, seed=3)
    upstream = place.normal(sequences, tokens, seed=4)
    ratio = (logprobs - old).double().exp()
    bounded = ratio.clamp(0.8, 1.28)
    wide = advantages.double().expand_as(ratio)
    losses = torch.where(mask, -torch.minimum(ratio * wide, bounded * wide), 0.0)
    slopes = torch.where(mask & (ratio * wide <= bounded * wide), -ratio * wide, 0.0)
    old = torch.where(mask, old, torch.nan)
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
    logprobs.requires_grad_()
    if layout == "packed":
        options["cu_seqlens"] = torch.arange(sequences + 1, device=place.device) * tokens
        given = [logprobs.flatten(), old.flatten(), mask.flatten()]
        advantages = advantages.flatten()
    else:
        given = [logprobs, old, mask]
    got = clipped_policy_loss(given[0], advantages, given[2], old_logprobs=given[1], **options)
    got = got.view(sequences, tokens)
    assert_close(got, losses)
    (grad,) = torch.autograd.grad(got, logprobs, upstream)
    assert_close(grad, slopes * upstream, gradient=True)


def head_problem(place: Any, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Hidden states, weight, bias and targets of 8 sequences, leaves that require a gradient."""
    rows, vocabulary, width = place.pick(*HEADS[name])
    weight = place.normal(vocabulary, width, dtype=dtype, seed=1)
    return {
        "hidden": place.normal(8, rows // 8, width, dtype=dtype).requires_grad_(),
        "weight": weight.mul_(width**-0.5).requires_grad_(),
        "bias": place.normal(vocabulary, dtype=dtype, seed=2).requires_grad_(),
        "targets": place.below(vocabulary, 8, rows // 8, seed=3),
    }


@dataclass(frozen=True)
class ExactHead:
    """The head in float64, some rows of the weight at a time: twice it would not fit beside it."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor

    @property
    def parts(self) -> list[slice]:
        step = max(1, 2**27 // self.weight.shape[1])
        return [slice(i, i + step) for i in range(0, len(self.weight), step)]

    def products(self) -> Tensor:
        """x @ W.T + b, as a leaf. Shape [..., V]."""
        hidden, bias = self.hidden.detach().double(), self.bias.detach().double()
        weight = self.weight.detach()
        columns = [hidden @ weight[i].double().t() + bias[i] for i in self.parts]
        return torch.cat(columns, -1).requires_grad_()

    def scores(
        self, products: Tensor, temperature: float, softcap: float | None, logit_scale: float
    ) -> tuple[Tensor, Tensor]:
        logits = logit_scale * products
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return exact_scores(logits / temperature, self.targets)

    def gradients(self, of_products: Tensor) -> list[Tensor | Iterator[Tensor]]:
        """Those of hidden, weight (in parts) and bias."""
        weight, flat = self.weight.detach(), of_products.flatten(0, -2)
        hidden = self.hidden.detach().flatten(0, -2).double()
        of_hidden = sum(flat[:, i] @ weight[i].double() for i in self.parts)
        of_weight = (flat[:, i].t() @ hidden for i in self.parts)
        assert isinstance(of_hidden, Tensor)
        return [of_hidden.view(self.hidden.shape), of_weight, flat.sum(0)]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("options", LINEAR_OPTIONS)
@pytest.mark.parametrize("name", HEADS)
def test_linear_token_logprobs(
    place: Any, dtype: torch.dtype, assert_close: Close, name: str, options: str, chunks: int
) -> None:
    place.cut(place.pick(*HEADS[name]), chunks)
    problem = head_problem(place, name, dtype)
    given = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0, **LINEAR_OPTIONS[options]}
    got = linear_token_logprobs(**problem, return_entropy=True, **given)
    exact = ExactHead(**problem)
    products = exact.products()
    wanted = exact.scores(products, **given)
    for mine, other in zip(got, wanted, strict=True):
        assert_close(mine, other)
    upstream = [place.normal(*got[0].shape, seed=4 + i) for i in range(2)]
    leaves = ["hidden", "weight", "bias"]
    grads = torch.autograd.grad(got, [problem[leaf] for leaf in leaves], upstream)
    above = [values.double() for values in upstream]
    (of_products,) = torch.autograd.grad(wanted, products, above)
    for grad, reference in zip(grads, exact.gradients(of_products), strict=True):
        assert_close(grad, reference, gradient=True)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name", ["Qwen", "seven"])
def test_targets_far_below_the_maximum_of_a_head(
    place: Any, dtype: torch.dtype, assert_close: Close, name: str, entropy: bool
) -> None:
    if place.name == "interpreter":  # which takes the bf16 operands of `tl.dot` for integers
        dtype = torch.float32
    problem = head_problem(place, name, dtype)
    with torch.no_grad():
        problem["bias"][3], problem["bias"][5] = 200.0, -torch.inf
    problem["targets"] = torch.where(problem["targets"] == 5, 3, problem["targets"])
    leaves = ["hidden", "weight", "bias"]
    got = linear_token_logprobs(**problem, return_entropy=True)[: 1 + entropy]
    grads = torch.autograd.grad(sum(got).sum(), [problem[leaf] for leaf in leaves])
    exact = ExactHead(**problem | {"bias": problem["bias"].detach().clamp(min=-1e4)})
    products = exact.products()
    wanted = exact.scores(products, 1.0, None, 1.0)[: 1 + entropy]
    assert (wanted[0] < -150).any()
    for mine, other in zip(got, wanted, strict=True):
        assert_close(mine, other)
    (of_products,) = torch.autograd.grad(sum(wanted).sum(), products)
    for grad, reference in zip(grads, exact.gradients(of_products), strict=True):
        assert_close(grad, reference, gradient=True)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", HEADS)
def test_linear_policy_loss(
    place: Any, dtype: torch.dtype, assert_close: Close, name: str, layout: str
) -> None:
    place.cut(place.pick(*HEADS[name]), 1 if layout == "padded" else 3)
    problem = head_problem(place, name, dtype)
    hidden, targets = problem["hidden"], problem["targets"]
    exact = ExactHead(**{name: value.detach().clone() for name, value in problem.items()})
    products = exact.products()
    logprobs, _ = exact.scores(products, 1.0, None, 1.0)
    old = logprobs.detach() + 0.15 * place.normal(*targets.shape, seed=5)
    mask = place.normal(*targets.shape, seed=6) > -0.5
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.5, 2.0, 0.0, -0.3, 1.0], device=place.device)
    ratio, wide = torch.exp(logprobs - old), advantages.double()[:, None]
    losses = -torch.minimum(ratio * wide, ratio.clamp(0.8, 1.28) * wide)
    # times the count of tokens, as a loss scale would: in fp16 gradients of a mean underflow
    value = torch.where(mask, losses, 0.0).sum()
    leaves = ["hidden", "weight", "bias"]
    (of_products,) = torch.autograd.grad(value, products)
    references = exact.gradients(of_products)

    with torch.no_grad():  # masked slots may hold anything
        hidden[~mask] = torch.nan
        old[~mask] = torch.inf
        targets[~mask] = -100
    given = [hidden, targets, mask, old.float()]
    more: dict[str, Any] = {}
    if layout == "packed":
        more["cu_seqlens"] = torch.arange(9, device=place.device) * targets.shape[1]
        given = [hidden.flatten(0, 1), *(values.flatten() for values in given[1:])]
    out = linear_policy_loss(
        given[0],
        problem["weight"],
        given[1],
        advantages,
        given[2],
        bias=problem["bias"],
        old_logprobs=given[3],
        surrogate=Clip(0.2, 0.28),
        aggregate=TokenMean(),
        **more,
    )
    count = mask.sum()
    assert out.loss.dtype == torch.float32
    # terms of both signs are measured by their sizes, by which they move with the log-probs: these
    # are right to 1e-5 of the largest (on an H100 in fp16 to a tenth of that, all to one side)
    limit = 1e-5 * logprobs[mask].abs().amax().clamp(min=1.0)
    assert (out.loss.double() * count - value).abs() <= limit * losses[mask].abs().sum()
    grads = torch.autograd.grad(out.loss * count, [problem[leaf] for leaf in leaves])
    for grad, reference in zip(grads, references, strict=True):
        assert_close(grad, reference, gradient=True)


@pytest.mark.parametrize("leaf", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_policy_loss"])
def test_each_gradient_alone(place: Any, op: str, leaf: str) -> None:
    problem = head_problem(place, "Qwen", torch.bfloat16)

    def run() -> Tensor:
        if op == "linear_token_logprobs":
            return linear_token_logprobs(**problem).sum()
        given = {name: problem[name] for name in ("hidden", "weight", "targets", "bias")}
        return linear_policy_loss(
            **given,
            advantages=torch.linspace(-1, 1, 8, device=place.device),
            surrogate=Clip(),
            aggregate=SequenceMean(),
        ).loss

    (together, *_) = torch.autograd.grad(
        run(), [problem[name] for name in (leaf, *({"hidden", "weight", "bias"} - {leaf}))]
    )
    for name in ("hidden", "weight", "bias"):
        problem[name] = problem[name].detach().requires_grad_(name == leaf)
    (alone,) = torch.autograd.grad(run(), problem[leaf])
    assert alone.norm() > 0
    torch.testing.assert_close(alone, together, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["linear_token_logprobs", "linear_policy_loss"])
def test_the_sum_over_the_vocabulary_is_not_reduced_in_half_precision(
    place: Any, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place.name == "cpu":
        pytest.skip("a CPU's products leave in the dtype of their operands")
    rows, vocabulary, width = place.pick((264, 262_147, 2048), (8, 515, 24))
    hidden = place.normal(8, rows // 8, width, dtype=torch.bfloat16).requires_grad_()
    weight = place.normal(vocabulary, width, dtype=torch.bfloat16, seed=1).mul_(width**-0.5)
    targets = place.below(vocabulary, 8, rows // 8, seed=3)
    left_in: list[torch.dtype] = []
    mm = torch.mm

    def recording_mm(*operands: Tensor, **options: Any) -> Tensor:
        product = mm(*operands, **options)
        left_in.append(product.dtype)
        return product

    if op == "linear_token_logprobs":
        value = linear_token_logprobs(hidden, weight, targets).sum()
        monkeypatch.setattr(torch, "mm", recording_mm)
    else:
        monkeypatch.setattr(torch, "mm", recording_mm)
        advantages = -torch.ones(8, device=place.device)
        options: dict[str, Any] = {"surrogate": Reinforce(), "aggregate": Sum()}
        value = linear_policy_loss(hidden, weight, targets, advantages, **options).loss
    (grad,) = torch.autograd.grad(value, hidden)
    assert torch.bfloat16 not in left_in
    bias = torch.zeros(vocabulary, dtype=torch.bfloat16, device=place.device)
    exact = ExactHead(hidden, weight, bias, targets)
    products = exact.products()
    (of_products,) = torch.autograd.grad(exact.scores(products, 1.0, None, 1.0)[0].sum(), products)
    wanted = exact.gradients(of_products)[0]
    assert isinstance(wanted, Tensor)
    # measured on an H100: 2.3e-3 where cuBLAS reduces in bf16, 1.66e-3 where it rounds once
    assert (grad.double() - wanted).norm() <= place.pick(2e-3, 8e-3) * wanted.norm()
