"""What is measured: one case is an op at a size, and a grid is cases in order of importance."""

from dataclasses import dataclass, replace

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORWARD, BOTH, FROZEN = "forward", "forward and backward", "frozen head"
SEQUENCES = 8


@dataclass(frozen=True)
class Case:
    """An op at a size.

    Attributes:
        op: Name of the op, a key of `benchmarks.ops.OPS`.
        passes: `FORWARD`, `BOTH`, or `FROZEN`: both, but no gradient of the head's weight.
        dtype: A key of `DTYPES`.
        tokens: T, over `SEQUENCES` sequences.
        vocabulary: V.
        width: H; 0 for ops that start from logits.
        active: Share of the rows whose gradient is not zero. 1.0; 0.6: so many are unmasked; 0.3:
            and half of the groups have an advantage of zero.
    """

    op: str
    passes: str
    dtype: str
    tokens: int
    vocabulary: int
    width: int = 0
    active: float = 1.0

    def __str__(self) -> str:
        width = f" H={self.width}" if self.width else ""
        vocabulary = f" V={self.vocabulary}" if self.vocabulary else ""
        return (
            f"{self.op}, {self.passes}, {self.dtype}, T={self.tokens}{width}{vocabulary}, "
            f"{self.active:.0%} active"
        )


def policy(passes: str, dtype: str, size: Case, active: float = 1.0) -> Case:
    return replace(size, op="linear_policy_loss", passes=passes, dtype=dtype, active=active)


def scores(passes: str, dtype: str, size: Case) -> Case:
    return replace(size, op="linear_token_logprobs", passes=passes, dtype=dtype)


def logits(passes: str, dtype: str, size: Case) -> Case:
    return replace(size, op="token_logprobs", passes=passes, dtype=dtype, width=0)


def clipped(tokens: int) -> Case:
    return Case("clipped_policy_loss", BOTH, "fp32", tokens, 0)


def loss(tokens: int) -> Case:
    return Case("policy_loss", BOTH, "fp32", tokens, 0)


def cpu_grid(tokens: int = 2048) -> list[Case]:
    """What a machine without a GPU measures: the bars first, at one size, then a sweep of T."""
    size = Case("", "", "", tokens, vocabulary=32768, width=768)
    return [
        *(policy(BOTH, dtype, size, active) for active in (1.0, 0.3) for dtype in DTYPES),
        *(logits(passes, dtype, size) for dtype in DTYPES for passes in (FORWARD, BOTH)),
        clipped(512 * tokens),
        loss(512 * tokens),
        scores(FORWARD, "fp32", size),
        scores(FORWARD, "bf16", size),
        policy(BOTH, "bf16", size, 0.6),
        policy(FROZEN, "bf16", size),
        scores(BOTH, "bf16", size),
        *(policy(BOTH, "bf16", replace(size, tokens=tokens // n)) for n in (4, 2)),
    ]


BARS = Case("", "", "", 8192, 151936, 4096)


def headlines() -> list[Case]:
    """The five cases that README shows, which every GPU run measures first."""
    return [
        policy(BOTH, "bf16", BARS),
        policy(BOTH, "bf16", BARS, 0.3),
        scores(FORWARD, "bf16", BARS),
        logits(BOTH, "bf16", BARS),
        clipped(2**22),
    ]


def quick_gpu_grid() -> list[Case]:
    return [
        *headlines(),
        policy(FROZEN, "bf16", BARS),
        scores(BOTH, "bf16", BARS),
        logits(FORWARD, "bf16", BARS),
        loss(2**22),
    ]


def gpu_grid() -> list[Case]:
    """What one GPU of 80 GB measures: the bars, one axis at a time, and then what is left."""
    sizes = [
        *(replace(BARS, tokens=tokens) for tokens in (2048, 32768)),
        *(replace(BARS, vocabulary=vocabulary) for vocabulary in (32768, 262144)),
        *(replace(BARS, width=width) for width in (1024, 8192)),
    ]
    grid = [
        *quick_gpu_grid(),
        *(policy(BOTH, "bf16", size, active) for size in sizes for active in (1.0, 0.3)),
        *(logits(BOTH, "bf16", size) for size in sizes[:4]),
        *(scores(passes, "bf16", size) for size in sizes for passes in (FORWARD, BOTH)),
        policy(BOTH, "bf16", BARS, 0.6),
        *(policy(FROZEN, "bf16", size) for size in sizes),
        scores(FROZEN, "bf16", BARS),
        *(logits(FORWARD, "bf16", size) for size in sizes[:4]),
        *(logits(passes, "fp32", BARS) for passes in (FORWARD, BOTH)),
        policy(BOTH, "fp32", replace(BARS, tokens=2048)),
    ]
    return list(dict.fromkeys(grid))


def small_grid() -> list[Case]:
    """One small case of every op and pass, to try the machinery."""
    size = Case("", "", "", 64, 512, 32)
    return [
        *(policy(BOTH, dtype, size, active) for dtype in DTYPES for active in (1.0, 0.6, 0.3)),
        *(logits(passes, dtype, size) for dtype in DTYPES for passes in (FORWARD, BOTH)),
        policy(FROZEN, "bf16", size),
        *(scores(passes, "bf16", size) for passes in (FORWARD, BOTH, FROZEN)),
        policy(BOTH, "bf16", replace(size, tokens=128)),
        clipped(4096),
        loss(4096),
    ]
