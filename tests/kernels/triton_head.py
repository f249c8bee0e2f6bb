"""From hidden states to gradients over the kernels, in Triton's interpreter on CPU tensors.

Run by `test_triton_interpreter.py` in a process of its own. Both products run: the fused one at a
tile of a few rows and columns and in fp32 (the interpreter's bf16 product over descriptors is
wrong), and the library's with the pass that follows it. The oracle is torch in float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from igrpo_kernels import (
    Cispo,
    Clip,
    SequenceClip,
    SequenceMean,
    TokenMean,
    linear_policy_loss,
    linear_token_logprobs,
)
from igrpo_kernels._triton import exp_product, exp_rows, head_rows, head_softmax
from igrpo_kernels.linear_head import LinearHead
from igrpo_kernels.row_softmax import LogitTransform
from igrpo_kernels.row_statistics import LARGEST, RowStatistics

SMALL = exp_product.Tile(rows=16, columns=32, depth=16, group=2, warps=4, stages=1)
ONE = torch.ones(1)
TRANSFORMS = {
    "plain": LogitTransform(ONE),
    "temperature": LogitTransform(torch.tensor([0.7]), logit_scale=1.3),
    "temperature per row": LogitTransform(torch.linspace(0.5, 2.0, 20)),
    "cap": LogitTransform(torch.tensor([0.9]), softcap=5.0, logit_scale=1.3),
}
SHAPES = [(1, 1, 1), (2, 1, 4), (5, 7, 4), (20, 70, 20), (16, 64, 16)]  # N, V, H


@pytest.fixture(params=["fused", "library"], autouse=True)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
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
        self.transform = transform.take(slice(rows))
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


def check(got: Tensor, wanted: Tensor, rtol: float = 1e-5, atol: float = 3e-5) -> None:
    """Compare with float64: to 1e-5 of the logits' scale, which is about 10 here."""
    torch.testing.assert_close(got.double(), wanted.double(), rtol=rtol, atol=atol)


def check_rows(got: Tensor, wanted: Tensor, limit: float = 1e-5) -> None:
    """Compare each row by the size of the largest, so that no row hides among the others.

    Its own size would not do: of an entropy's gradient the terms may cancel in a row.
    """
    assert got.isfinite().all()
    assert got.shape == wanted.shape
    if got.numel():
        errors, sizes = (part.double().norm(dim=-1) for part in (got - wanted, wanted))
        assert errors.max() <= limit * sizes.max().clamp(min=0.1)


@pytest.mark.parametrize(("bias", "entropy"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_to_gradients(
    shape: tuple[int, int, int], name: str, bias: bool, entropy: bool
) -> None:
    problem = Problem(shape, TRANSFORMS[name], bias=bias)
    softmax = problem.run(entropy=entropy)
    logprobs, entropies = problem.exact(problem.products())
    check(softmax.statistics.logprobs, logprobs)
    if entropy:
        check(softmax.statistics.entropy, entropies)
    upstream = torch.randn(shape[0])
    on_entropy = torch.randn(shape[0]) if entropy else None
    found = softmax.gradient_(upstream, on_entropy, dtype=torch.float32, scales_hidden=True)
    wanted = problem.gradient(upstream, on_entropy)
    check_rows(found.matrix * found.factors[:, None], wanted)
    check_rows(found.matrix.t() @ found.scaled_hidden, wanted.t() @ problem.hidden.double())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_a_backward_knows_from_the_forward(name: str) -> None:
    problem = Problem((20, 70, 20), TRANSFORMS[name], bias=True)
    for entropy in (False, True):
        forward = problem.run(entropy=entropy, keeps=False)
        assert forward.exponentials is None
        upstream = torch.randn(20), torch.randn(20) if entropy else None
        found = problem.run(known=forward.statistics).gradient_(*upstream, dtype=torch.float32)
        check_rows(found.matrix * found.factors[:, None], problem.gradient(*upstream))


def test_forward_alone_keeps_nothing_of_the_size_of_the_logits(product: str) -> None:
    problem = Problem((20, 70, 20))
    head = LinearHead(problem.weight, None, problem.transform)
    memory = head_softmax.new_memory(head, 20, keeps=False)
    assert memory.numel() == (0 if product == "fused" else 20 * 70)


def far_from_the_target() -> Problem:
    """Rows whose target's logit is 43 to 700 below the maximum, or at -inf; and rows in range."""
    problem = Problem((20, 70, 4), bias=True)
    assert problem.bias is not None
    problem.bias[3], problem.bias[7], problem.bias[9:12] = 43.0, 700.0, -torch.inf
    problem.targets[:10] = torch.tensor([5, 5, 5, 7, 7, 3, 9, 10, 5, 69])
    problem.weight[7] = 0.0
    return problem


@pytest.mark.parametrize("entropy", [False, True])
def test_rows_out_of_range_are_done_again(entropy: bool) -> None:
    problem = far_from_the_target()
    softmax = problem.run(entropy=entropy)
    logprobs, entropies = problem.exact(problem.products())
    assert (logprobs < -100).sum() > 10
    check(softmax.statistics.logprobs, logprobs)
    assert (softmax.statistics.total < LARGEST).all()
    if entropy:
        check(softmax.statistics.entropy, entropies)
    upstream = torch.randn(20), torch.randn(20) if entropy else None
    found = softmax.gradient_(*upstream, dtype=torch.float32)
    assert problem.bias is not None
    problem.bias.clamp_(min=-1e4)  # whose gradient torch knows
    check_rows(found.matrix * found.factors[:, None], problem.gradient(*upstream))


def test_rows_in_range_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem((20, 70, 4), bias=True)
    assert problem.bias is not None
    problem.bias[3], problem.targets[:] = 25.0, 5
    near = problem.run()
    assert (near.statistics.total > 2**20).all()
    problem.hidden[4] *= 100
    with_one = problem.run()
    others = torch.arange(20) != 4
    assert with_one.statistics.reference[4] != near.statistics.reference[4]
    assert torch.equal(with_one.exponentials[others], near.exponentials[others])
    problem.hidden[4] /= 100
    monkeypatch.setattr(exp_rows, "products_tile", None)  # nothing is multiplied again
    assert torch.equal(problem.run().exponentials[others], near.exponentials[others])


@pytest.mark.parametrize("others", [-torch.inf, -200.0])
def test_all_others_without_weight(others: float) -> None:
    problem = Problem((3, 40, 4), bias=True)
    assert problem.bias is not None
    problem.bias[:] = others
    problem.targets[:] = torch.tensor([4, 4, 39])
    problem.bias[4] = problem.bias[39] = 0.0
    problem.weight[39] = problem.weight[4]
    got = problem.run(entropy=True).statistics
    check(got.logprobs, -torch.full((3,), 2.0).log())
    problem.bias[39] = others
    got = problem.run(entropy=True).statistics
    assert (got.logprobs[:2] == 0).all()
    assert (got.entropy[:2] == 0).all()


def test_a_row_that_is_not_a_number_stays_one() -> None:
    problem = Problem((20, 40, 4))
    problem.hidden[3] = torch.nan
    logprobs = problem.run().statistics.logprobs
    assert logprobs[3].isnan()
    assert logprobs[torch.arange(20) != 3].isfinite().all()


@pytest.mark.parametrize("margin", [8.0, 16.0, 30.0])
def test_confident_tokens_keep_their_digits(margin: float) -> None:
    problem = Problem((16, 40, 4), bias=True)
    assert problem.bias is not None
    problem.targets[:], problem.weight[5] = 5, 0.0
    problem.bias[5] = (problem.products().amax() + margin).item()
    logits = problem.products()
    others = (logits - logits[:, 5:6]).exp()
    others[:, 5] = 0.0
    others = others.sum(1)
    softmax = problem.run()
    check(softmax.statistics.logprobs, -others.log1p(), 2e-5, 0.0)
    found = softmax.gradient_(torch.ones(16), dtype=torch.float32)
    got = (found.matrix * found.factors[:, None])[:, 5]
    check(got, others / (1 + others), 2e-5, 0.0)


def test_bf16_exponentials_take_the_front_half_of_the_products(product: str) -> None:
    if product == "fused":
        return  # the interpreter's bf16 product is wrong; its rounding is seen in the compiled code
    problem = Problem((20, 70, 20), TRANSFORMS["cap"], bias=True, dtype=torch.bfloat16)
    softmax = problem.run()
    assert softmax.exponentials.dtype == torch.bfloat16
    upstream = torch.randn(20)
    found = softmax.gradient_(upstream, dtype=torch.bfloat16)
    # rounded once, and the interpreter truncates
    check_rows(found.matrix * found.factors[:, None], problem.gradient(upstream, None), 8e-3)


class WaitsError(Exception):
    """A slice waits for the others."""


class Replay:
    """In place of a shard: hands back what earlier runs of all slices came to, then stops."""

    def __init__(self, start: int, known: list[Tensor]) -> None:
        self.start, self.known, self.seen = start, known, 0
        self.own: tuple[Any, Tensor] = (None, torch.empty(0))

    def add(self, values: Tensor) -> Tensor:
        return self._exchange(torch.Tensor.sum, values)

    def maximum(self, values: Tensor) -> Tensor:
        return self._exchange(torch.Tensor.amax, values)

    def _exchange(self, merge: Callable[..., Tensor], values: Tensor) -> Tensor:
        self.seen += 1
        if self.seen <= len(self.known):
            return self.known[self.seen - 1]
        self.own = merge, values
        raise WaitsError


def over_slices(problem: Problem, cuts: list[int], **options: Any) -> list[Any]:
    """Run all slices until none waits."""
    known: list[Tensor] = []
    while True:
        done, waiting = [], []
        for start, end in pairwise([0, *cuts, len(problem.weight)]):
            part = Problem((len(problem.hidden), 1, 1))
            part.__dict__ |= problem.__dict__
            part.weight = problem.weight[start:end]
            part.bias = None if problem.bias is None else problem.bias[start:end]
            shard = Replay(start, known)
            try:
                done.append(part.run(shard=shard, **options))
            except WaitsError:
                waiting.append(shard.own)
        if not waiting:
            return done
        assert not done
        merge = waiting[0][0]
        known.append(merge(torch.stack([values for _, values in waiting]), 0))


@pytest.mark.parametrize(("cuts", "entropy"), [([1, 69], False), ([0, 30, 30], True)])
@pytest.mark.parametrize("kind", ["temperature per row", "cap", "out of range"])
def test_slices_of_the_vocabulary(kind: str, cuts: list[int], entropy: bool) -> None:
    if kind == "out of range":
        problem = far_from_the_target()
    else:
        problem = Problem((20, 70, 20), TRANSFORMS[kind], bias=True)
    count = len(problem.hidden)
    logprobs, entropies = problem.exact(problem.products())
    upstream = torch.randn(count), torch.randn(count) if entropy else None
    grads = []
    for softmax in over_slices(problem, cuts, entropy=entropy):
        check(softmax.statistics.logprobs, logprobs)
        if entropy:
            check(softmax.statistics.entropy, entropies)
        found = softmax.gradient_(*upstream, dtype=torch.float32)
        grads.append(found.matrix * found.factors[:, None])
    if problem.bias is not None:
        problem.bias.clamp_(min=-1e4)
    check_rows(torch.cat(grads, 1), problem.gradient(*upstream))


# The ops over the kernels, against themselves over the twins


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make CPU tensors say that they are CUDA's, from here on."""

    def switch() -> None:
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))

    return switch


SURROGATES = {
    "clip": {"surrogate": Clip(0.2, 0.28)},
    "dual clip, KL and weights": {"surrogate": Clip(0.2, 0.2, dual=2.0), "kl_coef": 0.2},
    "clip with its entropy logged": {"surrogate": Clip(), "return_entropy": True},
    "clip with an entropy bonus": {"surrogate": Clip(), "entropy_coef": 0.1},
    "CISPO": {"surrogate": Cispo(5.0)},
    "GSPO": {"surrogate": SequenceClip(0.2, 0.2)},
}


@pytest.mark.parametrize(
    ("softcap", "masked", "chunks"), [(None, False, 1), (None, True, 3), (4.0, False, 3)]
)
@pytest.mark.parametrize("name", SURROGATES)
def test_linear_policy_loss(
    name: str, softcap: float | None, masked: bool, chunks: int, on_cuda: Any,
    monkeypatch: pytest.MonkeyPatch, product: str,
) -> None:  # fmt: skip
    hidden = torch.randn(4, 5, 8, requires_grad=True)
    weight = torch.randn(70, 8, requires_grad=True)
    bias = torch.randn(70, requires_grad=True)
    mask = (torch.rand(4, 5) < 0.7) if masked else None
    given = {
        "old_logprobs": -4 - torch.rand(4, 5),
        "ref_logprobs": -4 - torch.rand(4, 5) if "KL" in name else None,
        "importance_weights": torch.rand(4, 5) if "weights" in name else None,
        "temperature": torch.linspace(0.5, 1.5, 20).view(4, 5),
        "aggregate": SequenceMean() if masked else TokenMean(),
        "softcap": softcap,
        "bias": bias,
        **SURROGATES[name],
    }
    targets = torch.randint(0, 70, (4, 5))
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.5])

    def run() -> list[Tensor]:
        out = linear_policy_loss(hidden, weight, targets, advantages, mask, **given)
        grads = torch.autograd.grad(out.loss * 2, (hidden, weight, bias))
        return [out.loss.detach(), *grads, *(out.metrics[name] for name in sorted(out.metrics))]

    wanted = run()
    on_cuda()
    width = {"fused": 2, "library": 4}[product]
    monkeypatch.setattr(head_softmax, "CHUNK_BYTES", width * 70 * -(-20 // chunks))
    for value, exact in zip(run(), wanted, strict=True):
        check_rows(value, exact)


@pytest.mark.parametrize("leaf", ["hidden", "weight", "bias"])
def test_each_gradient_alone(leaf: str, on_cuda: Any) -> None:
    leaves = {"hidden": torch.randn(2, 5, 8), "weight": torch.randn(40, 8), "bias": torch.randn(40)}
    leaves[leaf].requires_grad_()
    rest = torch.randint(0, 40, (2, 5)), torch.tensor([1.0, -1.0])

    def run() -> Tensor:
        loss = linear_policy_loss(
            leaves["hidden"], leaves["weight"], *rest, bias=leaves["bias"],
            surrogate=Clip(), aggregate=TokenMean(),
        ).loss  # fmt: skip
        return torch.autograd.grad(loss, leaves[leaf])[0]

    wanted = run()
    on_cuda()
    torch.testing.assert_close(run(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_linear_token_logprobs(softcap: float | None, entropy: bool, on_cuda: Any) -> None:
    hidden = torch.randn(4, 5, 8, requires_grad=True)
    weight = torch.randn(70, 8, requires_grad=True)
    mask = torch.rand(4, 5) < 0.7
    options = {"mask": mask, "softcap": softcap, "temperature": 0.8, "return_entropy": entropy}
    targets = torch.where(mask, torch.randint(0, 70, (4, 5)), -100)
    upstream = torch.randn(2, 4, 5)

    def run() -> list[Tensor]:
        out = linear_token_logprobs(hidden, weight, targets, **options)
        out = out if entropy else (out,)
        value = sum((part * above).sum() for part, above in zip(out, upstream, strict=False))
        return [*(part.detach() for part in out), *torch.autograd.grad(value, (hidden, weight))]

    wanted = run()
    on_cuda()
    for value, exact in zip(run(), wanted, strict=True):
        check_rows(value, exact)


# Bad input, and sizes at the edge


@pytest.mark.parametrize("size", [(1, 8), (40, 1), (1, 1)])
def test_a_vocabulary_or_a_width_of_one(size: tuple[int, int], on_cuda: Any) -> None:
    hidden = torch.randn(2, 3, size[1], requires_grad=True)
    weight = torch.randn(*size, requires_grad=True)
    given = torch.randint(0, size[0], (2, 3)), torch.tensor([1.0, -1.0])

    def run() -> tuple[Tensor, ...]:
        out = linear_policy_loss(hidden, weight, *given, surrogate=Clip(), aggregate=TokenMean())
        return out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))

    wanted = run()
    on_cuda()
    for value, exact in zip(run(), wanted, strict=True):
        check_rows(value, exact)


@pytest.mark.parametrize("case", ["mask", "advantages", "no tokens"])
def test_no_active_row(case: str, on_cuda: Any) -> None:
    length = 0 if case == "no tokens" else 3
    hidden = torch.randn(2, length, 8, requires_grad=True)
    weight = torch.randn(40, 8, requires_grad=True)
    mask = torch.zeros(2, length, dtype=torch.bool) if case == "mask" else None
    advantages = torch.zeros(2) if case == "advantages" else torch.ones(2)
    on_cuda()
    targets = torch.zeros(2, length, dtype=torch.long)
    out = linear_policy_loss(
        hidden, weight, targets, advantages, mask, surrogate=Clip(), aggregate=TokenMean()
    )
    assert out.loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.loss, (hidden, weight)))


def test_a_chunk_budget_below_one_row(product: str) -> None:
    head = LinearHead(torch.randn(70, 8), None, LogitTransform(ONE), chunk_bytes=1)
    assert head_softmax.rows_per_chunk(head, 20, keeps=True) == 1
    assert head_softmax.rows_per_chunk(head, 20, keeps=False) == 1
    widths = {"fused": 2, "library": 4}
    budget = replace(head, chunk_bytes=widths[product] * 70 * 5)
    assert head_softmax.rows_per_chunk(budget, 20, keeps=True) == 5


@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "trains", "chunk"),
    [
        (8192, 151_936, 4096, True, 8833),  # fits
        (8192, 262_144, 4096, True, 8192),  # two chunks and an fp32 dW would take as much
        (8192, 262_144, 4096, False, 5120),
        (9216, 151_936, 1024, True, 8833),  # here they take less
        (32_768, 151_936, 4096, True, 8833),
    ],
)
def test_rows_go_at_once_where_that_takes_no_more_memory(
    rows: int, vocabulary: int, width: int, trains: bool, chunk: int, product: str
) -> None:
    with torch.device("meta"):
        weight = torch.empty(vocabulary, width, dtype=torch.bfloat16).requires_grad_(trains)
    if product == "fused":
        head = LinearHead(weight, None, LogitTransform(ONE))
        assert head_softmax.rows_per_chunk(head, rows, keeps=True) == chunk


def test_hidden_states_that_begin_off_a_boundary() -> None:
    problem = Problem((20, 70, 20))
    aligned = problem.run().statistics.logprobs
    moved = torch.empty(20 * 20 + 1)[1:].view(20, 20)
    moved.copy_(problem.hidden)
    assert moved.data_ptr() % 16
    problem.hidden = moved
    assert torch.equal(problem.run().statistics.logprobs, aligned)


def test_rows_of_exponentials_begin_at_multiples_of_16_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_softmax, "tile_for", lambda weight: SMALL)
    for vocabulary in (1, 7, 70, 72):
        head = LinearHead(torch.randn(vocabulary, 8), None, LogitTransform(ONE))
        memory = head_softmax.new_memory(head, 3, keeps=True)
        assert memory.stride(0) * memory.element_size() % 16 == 0
        assert memory.shape[1] >= vocabulary


def test_float64_is_refused_in_words() -> None:
    problem = Problem((2, 5, 4), dtype=torch.float64)
    with pytest.raises(TypeError, match="float64 has no kernel: cast to float32, or move"):
        problem.run()


def test_statistics_are_of_the_twins_kind() -> None:
    assert isinstance(Problem((2, 5, 4)).run().statistics, RowStatistics)


# Which product runs


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., torch.device]]:
    """A GPU of some capability, asked for and not used."""

    def make(capability: tuple[int, int], hip: str | None = None) -> torch.device:
        exp_product.tile_of_device.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        return torch.device("cuda", 0)

    yield make
    exp_product.tile_of_device.cache_clear()


@pytest.mark.parametrize(
    ("capability", "hip", "fuses"),
    [
        ((9, 0), None, True),
        ((10, 0), None, True),
        ((8, 0), None, False),  # no copy engine
        ((8, 9), None, False),
        ((12, 0), None, False),  # too little shared memory
        ((9, 4), "6.4", False),  # AMD's gfx942 calls itself so
    ],
)
def test_the_product_of_a_device(
    capability: tuple[int, int], hip: str | None, fuses: bool, device: Any
) -> None:
    assert (exp_product.tile_of_device(device(capability, hip)) is not None) == fuses


def test_the_product_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exp_product, "tile_of_device", lambda device: SMALL)
    weight = torch.randn(40, 16).bfloat16()
    assert exp_product.tile_for(weight) is SMALL
    for other in (
        weight.half(),
        weight.float(),
        weight[:, :12].contiguous(),  # rows of 24 bytes
        weight[:, 1:9],  # begins off a boundary
        weight.t(),
        weight[:0],
        torch.randn(40, 1).bfloat16(),
    ):
        assert exp_product.tile_for(other) is None
    assert exp_product.tile_for(weight[:, :8]) is SMALL  # rows 32 bytes apart


def test_every_tile_fits_what_a_block_has() -> None:
    for tile in exp_product.TILES.values():
        operands = tile.stages * (tile.rows + tile.columns) * tile.depth * 2
        assert operands + tile.rows * (tile.columns // 2) * 2 <= 227 * 1024
        assert tile.columns // 4 * 2 >= 16  # the least box of the copy engine, in bytes
