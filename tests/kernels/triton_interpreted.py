"""Every Triton kernel against its twin, in Triton's interpreter on CPU tensors.

Run by `test_triton_interpreter.py` in a process of its own: TRITON_INTERPRET has to be set before
triton is first imported.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from igrpo_kernels import (
    Clip,
    TokenMean,
    VocabularyShard,
    clipped_policy_loss,
    head_softmax,
    linear_policy_loss,
    token_logprobs,
)
from igrpo_kernels._triton import clipped_policy_loss as clipped
from igrpo_kernels._triton import head_softmax as head_kernels
from igrpo_kernels._triton import softmax_rows as kernels
from igrpo_kernels._triton import token_logprobs as on_logits
from igrpo_kernels.relative_softmax import (
    LogitTransform,
    SoftmaxRows,
    TargetColumns,
    softmax_of_logits,
)
from igrpo_kernels.row_statistics import RowStatistics, SoftmaxStatistics

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = {
    "plain": {"temperature": torch.ones(1)},
    "temperature": {"temperature": torch.full((1,), 0.7)},
    "temperature per row": {"temperature": torch.tensor([0.5, 1.0, 2.0])},
    "cap and scale": {"temperature": torch.full((1,), 0.9), "softcap": 5.0, "logit_scale": 1.3},
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_V", 128)


def rows(vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (torch.randn(3, vocabulary) * 3).to(dtype), torch.randint(0, vocabulary, (3,))


class Twin:
    """The softmax of the CPU over the whole chunk: what the kernels are compared with."""

    def __init__(
        self, products: Tensor, targets: Tensor, transform: LogitTransform, entropy: bool = False
    ) -> None:
        logits = transform.apply(products.clone())
        at = TargetColumns(targets)
        self.rows = SoftmaxRows(
            softmax_of_logits(logits, at, entropy=entropy, out=logits), at, transform, logits
        )
        self.statistics = self.rows.statistics

    def keep_(self, rows: Tensor) -> "Twin":
        self.rows = self.rows.keep_(rows)
        self.statistics = self.rows.statistics
        return self

    def gradient_(self, by_logprob: Tensor, by_entropy: Tensor | None = None) -> Tensor:
        matrix = self.rows.exponentials
        found = self.rows.gradient_(by_logprob, by_entropy, dtype=matrix.dtype)
        kept = found.multiplied(matrix.dtype)
        if found.rows is None:
            return kept
        every = torch.zeros_like(matrix)
        every[found.rows] = kept
        return every


def check_scores(got: RowStatistics, wanted: RowStatistics, tolerance: float = 1e-6) -> None:
    """Compare log-probs, and entropies where there are any; a few roundings of fp32."""
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(got.logprobs, wanted.logprobs, **close)
    assert (got.entropy is None) == (wanted.entropy is None)
    if wanted.entropy is not None:
        torch.testing.assert_close(got.entropy, wanted.entropy, **close)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 7, 128, 507])
def test_forward_and_backward(
    vocabulary: int, dtype: torch.dtype, name: str, entropy: bool
) -> None:
    transform = LogitTransform(**TRANSFORMS[name])
    products, targets = rows(vocabulary, dtype)
    wanted = Twin(products.float(), targets, transform, entropy)
    got = kernels.softmax_rows_(products, targets, transform, entropy=entropy)
    check_scores(got.statistics, wanted.statistics, 2e-6)
    upstream = torch.tensor([1.0, -0.5, 2.0])
    on_entropy = torch.tensor([0.3, -1.0, 0.0]) if entropy else None
    grad = got.gradient_(upstream, on_entropy)
    assert grad.data_ptr() == products.data_ptr()
    # the interpreter truncates where it should round: one unit in the last place of the dtype
    rounding = torch.finfo(dtype).eps
    exact = wanted.gradient_(upstream, on_entropy)
    torch.testing.assert_close(grad.float(), exact, rtol=rounding + 1e-5, atol=2e-6)


@pytest.mark.parametrize("vocabulary", [50257])
def test_vocabulary_not_a_multiple_of_the_block_verl_2656(
    vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BLOCK_V", 4096)
    products = -30 - torch.rand(3, vocabulary)
    targets = torch.tensor([0, 4096, vocabulary - 1])
    transform = LogitTransform(torch.ones(1))
    wanted = Twin(products, targets, transform, True)
    got = kernels.softmax_rows_(products, targets, transform, entropy=True)
    assert (got.statistics.logprobs <= 0).all()
    check_scores(got.statistics, wanted.statistics, 2e-6)


@pytest.mark.parametrize("level", [-89.0, -1e4, 1e4, -3e38])
def test_running_maximum_that_starts_at_zero(level: float) -> None:
    products = torch.full((2, 300), level)
    got = kernels.softmax_rows_(
        products, torch.tensor([0, 299]), LogitTransform(torch.ones(1)), entropy=True
    ).statistics
    uniform = torch.full((2,), 300.0).log()
    torch.testing.assert_close(got.logprobs, -uniform, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.entropy, uniform, rtol=1e-6, atol=0)


def test_lanes_that_see_nothing_and_logits_of_minus_infinity() -> None:
    products = torch.full((3, 131), -torch.inf)  # three lanes of the second block are used
    products[0, 130] = 1.0
    products[1, :2] = torch.tensor([0.0, 1.0])
    products[2, ::2] = -2.0
    targets = torch.tensor([130, 1, 1])
    transform = LogitTransform(torch.ones(1))
    wanted = Twin(products, targets, transform, True)
    got = kernels.softmax_rows_(products, targets, transform, entropy=True)
    check_scores(got.statistics, wanted.statistics)
    upstream = torch.ones(3), torch.ones(3)
    torch.testing.assert_close(
        got.gradient_(*upstream), wanted.gradient_(*upstream), rtol=1e-5, atol=1e-6
    )


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
    transform = LogitTransform(torch.ones(1))
    wanted = Twin(flat, targets, transform)
    got = kernels.softmax_rows_forward(walked, targets, None, transform, entropy=False)
    check_scores(got, wanted.statistics)
    grad = torch.full_like(walked, torch.nan, memory_format=torch.contiguous_format)
    upstream = torch.linspace(1, 2, len(targets))
    kernels.softmax_rows_backward(grad, walked, targets, None, transform, got, upstream, None)
    torch.testing.assert_close(grad.view_as(flat), wanted.gradient_(upstream), rtol=1e-5, atol=1e-6)


def test_rows_left_out_and_rows_of_no_gradient_are_written_prime_rl_1525() -> None:
    products = torch.randn(4, 131)
    products[1] = torch.nan
    mask = torch.tensor([True, False, True, True])
    targets = torch.tensor([5, -100, 7, 130])
    transform = LogitTransform(torch.ones(1))
    got = kernels.softmax_rows_forward(products, targets, mask, transform, entropy=True)
    assert got.logprobs[1] == 0
    assert got.entropy is not None
    assert got.entropy[1] == 0
    grad = torch.full_like(products, torch.nan)
    upstream = torch.tensor([1.0, 1.0, 0.0, 1.0])
    kernels.softmax_rows_backward(grad, products, targets, mask, transform, got, upstream, None)
    assert (grad[1:3] == 0).all()
    kept = torch.tensor([0, 3])
    wanted = Twin(products[kept], targets[kept], transform, entropy=True)
    check_scores(got.take(kept), wanted.statistics)
    torch.testing.assert_close(grad[kept], wanted.gradient_(torch.ones(2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kept", [None, [0, 2], [2], []])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [7, 131, 512])
def test_keeping_rows_and_narrowing_in_place(
    vocabulary: int, dtype: torch.dtype, kept: list[int] | None
) -> None:
    products, targets = rows(vocabulary, torch.float32)
    memory = products.untyped_storage()
    transform = LogitTransform(torch.tensor([0.5, 1.0, 2.0]))
    wanted = Twin(products, targets, transform, True)
    got = kernels.softmax_rows_(products, targets, transform, entropy=True)
    upstream = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.1, 0.0])
    if kept is not None:
        index = torch.tensor(kept, dtype=torch.long)
        wanted, got = wanted.keep_(index), got.keep_(index)
        upstream = upstream[0][index], upstream[1][index]
    check_scores(got.statistics, wanted.statistics, 2e-6)
    grad = got.gradient_(*upstream, dtype=dtype)
    exact = wanted.gradient_(*upstream)
    assert grad.dtype == dtype
    if kept is None or dtype == torch.bfloat16:
        assert grad.untyped_storage().data_ptr() == memory.data_ptr()
    rounding = torch.finfo(dtype).eps  # the interpreter truncates
    torch.testing.assert_close(grad.float(), exact, rtol=rounding + 1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(70_000, 3), (2, 66_000, 3)])
def test_rows_are_on_the_axis_of_the_grid_that_has_no_limit_liger_1294(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("softmax_rows_fwd_kernel", "softmax_rows_bwd_kernel"):
        monkeypatch.setattr(kernels, name, Recorder())
    logits, heat = torch.zeros(shape), torch.ones(1)
    count = logits[..., 0].numel()
    targets = torch.zeros(count, dtype=torch.long)
    known = on_logits.forward(logits, targets, None, heat, False)
    grad = torch.empty_like(logits)
    on_logits.write_gradient(grad, logits, targets, None, heat, known, torch.ones(count), None)
    assert grids == [(count,)] * 2


def test_no_rows() -> None:
    empty = torch.empty(0, 5)
    none = torch.empty(0, dtype=torch.long)
    got = kernels.softmax_rows_(empty, none, LogitTransform(torch.ones(1)), entropy=True)
    assert got.statistics.logprobs.shape == (0,)
    assert got.gradient_(torch.empty(0)).shape == (0, 5)


class Given:
    """In place of a shard: keeps a slice's statistics, and hands back what it was told to."""

    def __init__(self, whole: SoftmaxStatistics | None = None) -> None:
        self.whole = whole

    def merge(self, statistics: SoftmaxStatistics) -> SoftmaxStatistics:
        self.seen = statistics
        return statistics if self.whole is None else self.whole


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("cuts", [[200], [1, 130], [0, 131, 131, 507]])
def test_slices_of_the_vocabulary(cuts: list[int], name: str, entropy: bool) -> None:
    transform = LogitTransform(**TRANSFORMS[name])
    products, _ = rows(507, torch.float32)
    products[0] += 1e3
    products[1, 131:] = -torch.inf  # the whole of a slice
    targets = torch.tensor([0, 130, 506])
    products[1, 130] = products[2, 506] = -1.0  # below the zero of a column that is not there
    wanted = Twin(products, targets, transform, entropy)
    parts = [(products[:, a:b], targets - a) for a, b in pairwise([0, *cuts, 507])]
    seen = []
    for part, local in parts:
        shard = Given()
        kernels.softmax_rows_(part, local, transform, entropy=entropy, shard=shard)
        seen.append(shard.seen.stack())
    whole = Given(SoftmaxStatistics.unstack(torch.stack(seen)).merge())
    upstream = torch.tensor([1.0, -0.5, 2.0])
    on_entropy = torch.tensor([0.3, -1.0, 0.0]) if entropy else None
    grads = []
    for part, local in parts:
        copy = part.clone()
        got = kernels.softmax_rows_(copy, local, transform, entropy=entropy, shard=whole)
        check_scores(got.statistics, wanted.statistics, 2e-6)
        grads.append(got.gradient_(upstream, on_entropy))
        again = kernels.softmax_rows_(
            part.clone(), local, transform, entropy=entropy, shard=whole, known=got.statistics
        )
        assert torch.equal(again.gradient_(upstream, on_entropy), grads[-1])
    exact = wanted.gradient_(upstream, on_entropy)
    torch.testing.assert_close(torch.cat(grads, 1), exact, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 2, 2), (0, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_logprobs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base = torch.randn(*shape[:-1], shape[-1] + 1, 131).to(dtype)
    logits = base[..., :-1, :].requires_grad_()
    targets = torch.randint(0, 131, shape)
    mask = torch.rand(shape) < 0.8
    wanted = torch.stack(token_logprobs(logits, targets, mask=mask, return_entropy=True))
    flat, counted, heat = targets.flatten(), mask.flatten(), torch.ones(1)
    known = on_logits.forward(logits.detach(), flat, counted, heat, True)
    got = torch.stack(known.tensors[:2])
    torch.testing.assert_close(got.view_as(wanted), wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(2, flat.numel())
    grad = torch.full_like(logits, torch.nan, memory_format=torch.contiguous_format)
    given = flat, counted, heat, known, *upstream
    on_logits.write_gradient(grad, logits.detach(), *given)
    (exact,) = torch.autograd.grad(wanted, logits, upstream.view_as(wanted))
    rounding = torch.finfo(dtype).eps  # the interpreter truncates
    torch.testing.assert_close(grad, exact, rtol=rounding + 1e-5, atol=rounding / 100 + 1e-6)
    with torch.no_grad():
        beside = base[..., -1, :].clone()
        on_logits.write_gradient(logits, logits, *given)
        assert torch.equal(logits, grad)
        assert torch.equal(base[..., -1, :], beside)


def test_float64_is_refused_in_words() -> None:
    products = torch.zeros(1, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64 has no kernel: cast to float32, or move"):
        kernels.softmax_rows_(products, torch.tensor([0]), LogitTransform(torch.ones(1)))


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("shape", [(3, 5), (1, 1025), (0, 3)])
def test_clipped_policy_loss(shape: tuple[int, int], dual: float | None) -> None:
    mask = torch.rand(shape) < 0.7
    drawn = -torch.rand(shape)
    old = drawn + torch.randn(shape)
    if old.numel():
        old[0, 0] = -40.0  # beyond the largest log-ratio
    advantages = torch.randn(shape[0])
    logprobs = torch.where(mask, drawn, torch.nan).requires_grad_()
    options = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": dual}
    wanted = clipped_policy_loss(logprobs, advantages, mask, old_logprobs=old, **options)
    junk = torch.where(mask, old, torch.nan)
    spread = advantages[:, None].expand(shape)
    got, _ = clipped.losses_and_slopes(logprobs, junk, spread, mask, *options.values())
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(shape)
    (grad,) = torch.autograd.grad(got, logprobs, upstream)
    (exact,) = torch.autograd.grad(wanted, logprobs, upstream)
    torch.testing.assert_close(grad, exact, rtol=1e-6, atol=1e-6)


def test_opcheck_of_the_clipped_policy_loss() -> None:
    logprobs = (-torch.rand(2, 3)).requires_grad_()
    rest = (-torch.rand(2, 3), torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool))
    # the interpreter cannot run under the tracer: schema, autograd and fake tensors only
    torch.library.opcheck(
        clipped.losses_and_slopes,
        (logprobs, *rest, 0.2, 0.2, None),
        test_utils=["test_schema", "test_autograd_registration", "test_faketensor"],
    )


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_linear_policy_loss_over_the_kernels(
    softcap: float | None, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = torch.randn(3, 4, 6, requires_grad=True)
    weight = torch.randn(131, 6, requires_grad=True)
    old_logprobs = -4 - torch.rand(3, 4)
    targets = torch.randint(0, 131, (3, 4))
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0]])
    shard = VocabularyShard.of(weight) if sharded else None

    def run() -> list[Tensor]:
        out = linear_policy_loss(
            hidden,
            weight,
            targets,
            torch.tensor([1.0, -1.0, 0.0]),
            mask,
            surrogate=Clip(),
            aggregate=TokenMean(),
            old_logprobs=old_logprobs,
            softcap=softcap,
            temperature=torch.linspace(0.5, 1.5, 12).view(3, 4),
            return_entropy=True,
            shard=shard,
        )
        grads = torch.autograd.grad(out.loss, (hidden, weight))
        return [out.loss, *grads, *out.metrics.values()]

    wanted = run()
    monkeypatch.setattr(head_softmax, "implementation", lambda head: head_kernels)
    for value, exact in zip(run(), wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=1e-6)
