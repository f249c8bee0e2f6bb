"""Where the tests of this folder run, and at what size.

One test, three places: CUDA tensors over the compiled kernels at real sizes (marker `gpu`), CPU
tensors over the twins at small sizes, and, in a process that sets TRITON_INTERPRET=1, CPU tensors
that say they are CUDA's, so that everything behind `is_cuda` runs where there is no GPU.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from igrpo_kernels import cpu_head_softmax

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
REAL_PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class NoReads(TorchDispatchMode):
    """Raises where an op's result has to reach the host."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        assert not any(part in name for part in ("_local_scalar", "nonzero", "unique", "equal"))
        if "aten.index" in name and isinstance(args[1], list):
            assert all(some is None or some.dtype != torch.bool for some in args[1])
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Place:
    """Where a test runs.

    Attributes:
        name: "cpu", "cuda" or "interpreter".
        device: Of the tensors.
        monkeypatch: Of the test.
    """

    name: str
    device: torch.device
    monkeypatch: pytest.MonkeyPatch

    @property
    def real(self) -> bool:
        """Whether sizes are real."""
        return self.name == "cuda"

    def pick(self, real: Any, small: Any) -> Any:
        """Choose a size."""
        return real if self.real else small

    def cut(self, size: tuple[int, int, int], chunks: int) -> None:
        """Make the ops over hidden states take a batch of (T, V, H) in so many chunks."""
        rows, *_ = size
        modules = [cpu_head_softmax]
        if self.name != "cpu":
            from igrpo_kernels._triton import head_softmax

            modules.append(head_softmax)
        most = -(-rows // chunks)
        for module in modules:
            self.monkeypatch.setattr(module, "rows_per_chunk", lambda *_, **__: most)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        """Random numbers; large tensors in parts, so that no fp32 copy of the whole exists."""
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.empty(shape, dtype=dtype, device=self.device)
        for part in values.flatten().split(2**28):
            part.copy_(torch.randn(part.shape, generator=generator, device=self.device))
        return values

    def below(self, bound: int, *shape: int, seed: int = 0) -> Tensor:
        """Random indices."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randint(bound, shape, generator=generator, device=self.device)

    def new_stream(self) -> AbstractContextManager[Any]:
        """A stream of its own on a GPU."""
        return torch.cuda.stream(torch.cuda.Stream(self.device)) if self.real else nullcontext()

    @contextmanager
    def without_waiting(self) -> Iterator[None]:
        """Raise where the host would wait for a GPU."""
        if self.name == "interpreter":
            with NoReads():
                yield
        elif self.real:
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        else:
            yield

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.real:
            torch.cuda.synchronize(self.device)


def with_out_dtype(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.mm` or `torch.addmm` with the argument that only CUDA has."""

    def emulated(*operands: Tensor, out_dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if out_dtype is not None:
            operands = tuple(operand.to(out_dtype) for operand in operands)
        return product(*operands, **rest)

    return emulated


@pytest.fixture(params=["interpreter"] if INTERPRETED else REAL_PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "interpreter":
        from igrpo_kernels._triton import exp_rows, head_rows, logit_rows

        for module in (exp_rows, head_rows, logit_rows):
            monkeypatch.setattr(module, "BLOCK_V", 128)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        for name in ("mm", "addmm"):
            monkeypatch.setattr(torch, name, with_out_dtype(getattr(torch, name)))
    device = torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")
    if request.param == "cuda":
        torch.cuda.empty_cache()
        # what the allocator hands out next is full of NaN, whoever asks for it
        block = torch.full((2**28,), torch.nan, device=device)
        del block
    yield Place(request.param, device, monkeypatch)
    if request.param == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


def norm_of(values: Tensor, euclidean: bool) -> Tensor:
    """Of a gradient the Euclidean norm, of other values the largest."""
    return values.norm() if euclidean else values.abs().max()


def in_parts(got: Tensor, wanted: Tensor | Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair a tensor's rows with those wanted: of 2^31 elements memory does not hold a float64."""
    if isinstance(wanted, Tensor):
        assert got.shape == wanted.shape
        parts = (values.detach().flatten().split(2**27) for values in (got, wanted))
        yield from zip(*parts, strict=True)
        return
    start = 0
    for part in wanted:
        yield got.detach()[start : start + len(part)], part
        start += len(part)
    assert start == len(got)


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Compare with float64: values by the largest, gradients by their norms.

    Values leave in fp32 and are off by 1e-5 of the largest at most. A gradient leaves in the
    dtype of its input: it is rounded once, and the gradient of the logits once before a product.
    """

    def check(got: Tensor, wanted: Tensor | Iterator[Tensor], *, gradient: bool = False) -> None:
        errors, sizes = [], []
        for mine, exact in in_parts(got, wanted):
            assert mine.isfinite().all()
            errors.append(norm_of(mine.double() - exact, gradient))
            sizes.append(norm_of(exact, gradient))
        error, size = (norm_of(torch.stack(norms), gradient) for norms in (errors, sizes))
        if not gradient:
            assert got.dtype == torch.float32
            assert error <= 1e-5 * size.clamp(min=1.0)
            return
        limit = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}[got.dtype]
        # the interpreter truncates where it should round: errors of E, weighed or not, and of the
        # scaled hidden states all go one way, and add up
        limit *= 3 if INTERPRETED else 1
        assert error <= limit * size

    return check
