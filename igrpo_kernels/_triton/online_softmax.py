# mypy: disable-error-code="no-untyped-def"
"""Device functions of the row kernels: the online softmax, and the transform before it."""

import triton
import triton.language as tl

# The least finite float32. A lane that has seen no logit yet holds it as its maximum, so that its
# first rescaling is exp(finite - finite) and not exp(-inf - -inf) = NaN.
FLOOR = tl.constexpr(-3.4028234663852886e38)
# exp underflows to zero far above this; a logit of -inf would make exp(z) z = 0 * -inf = NaN
LEAST = tl.constexpr(-1e4)


@triton.jit
def row_start(row, inner_size, outer_stride, inner_stride):
    """Offset of a row of a tensor [outer, inner, V], in 64 bits: N * V passes 2^31."""
    row = row.to(tl.int64)
    return (row // inner_size) * outer_stride + (row % inner_size) * inner_stride


@triton.jit
def cap(scaled, softcap):
    """tanh(scaled / softcap), as 2 sigmoid(2 x) - 1."""
    return 2 * tl.sigmoid(2 * scaled / softcap) - 1


@triton.jit
def transform(products, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP: tl.constexpr):
    """From products to logits."""
    logits = products * logit_scale
    if HAS_SOFTCAP:
        logits = softcap * cap(logits, softcap)
    return logits * inverse_temperature


@triton.jit
def fold(maximum, normalizer, moment, logits, HAS_MOMENT: tl.constexpr):
    """Take a block [LANES, W] into each lane's max m, sum of exp(z - m) and of exp(z - m) (z - m).

    A lane rescales once for its W logits, which one thread holds: 1 + 1/W exponentials a logit.
    """
    new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
    rescale = tl.exp(maximum - new_maximum)
    shifted = logits - new_maximum[:, None]
    exponentials = tl.exp(shifted)
    if HAS_MOMENT:
        moved = normalizer * tl.maximum(maximum - new_maximum, LEAST)
        added = tl.sum(exponentials * tl.maximum(shifted, LEAST), axis=1)
        moment = rescale * (moment + moved) + added
    return new_maximum, normalizer * rescale + tl.sum(exponentials, axis=1), moment


@triton.jit
def merge(maximum, normalizer, moment, HAS_MOMENT: tl.constexpr):
    """Merge the lanes into one maximum, sum and moment."""
    row_maximum = tl.max(maximum, axis=0)
    rescale = tl.exp(maximum - row_maximum)
    row_moment = 0.0
    if HAS_MOMENT:
        moved = normalizer * tl.maximum(maximum - row_maximum, LEAST)
        row_moment = tl.sum(rescale * (moment + moved), axis=0)
    return row_maximum, tl.sum(normalizer * rescale, axis=0), row_moment
