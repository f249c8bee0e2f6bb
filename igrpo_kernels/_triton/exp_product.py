# mypy: disable-error-code="no-untyped-def"
"""The head's product, whose epilogue leaves exponentials relative to the target's logit.

    z = cap(scale (x W' + b)) / temperature
    E[n, j] = exp(z[n, j] - reference[n]),  0 at the target
    sums[i, n] = sum over the columns j of tile i of E[n, j],  in fp32

What is stored is already the operand of the two products of the backward; a cap multiplies it by
its slope, and not the sums. Persistent: a program per multiprocessor walks the tiles, a group of
row tiles at a time, so that the weight is read from cache. On Hopper and newer the copy engine
moves the operands (TMA descriptors).
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .chunk import Chunk, multiprocessors
from .device_math import LEAST, LN2, LOG2E, exponents


@triton.jit
def finish_tile(
    products, row, column, target, reference, to_log2, scale, softcap, vocabulary,
    bias_ptr, e_desc,
    PIECES: tl.constexpr, HAS_MOMENT: tl.constexpr, STORES_SLOPE: tl.constexpr,
    SERIAL: tl.constexpr,
):  # fmt: skip
    """From products [N, W] to the row sums of their exponentials and moments; store the former.

    In pieces: fewer registers, and a store through less shared memory.
    """
    if PIECES > 1:
        N: tl.constexpr = products.shape[0]
        HALF: tl.constexpr = products.shape[1] // 2
        low, high = tl.split(tl.permute(tl.reshape(products, (N, 2, HALF)), (0, 2, 1)))
        total, moment = finish_tile(
            low, row, column, target, reference, to_log2, scale, softcap, vocabulary,
            bias_ptr, e_desc, PIECES // 2, HAS_MOMENT, STORES_SLOPE, SERIAL,
        )  # fmt: skip
        # One half after the other: the compiler would begin with all exponentials, and spill. It
        # cannot know that a sum is never negative, and waits for what adds zero.
        if SERIAL:
            scale += tl.minimum(tl.maximum(total, moment), 0.0)
        more, more_moment = finish_tile(
            high, row, column + HALF, target, reference, to_log2, scale, softcap, vocabulary,
            bias_ptr, e_desc, PIECES // 2, HAS_MOMENT, STORES_SLOPE, SERIAL,
        )  # fmt: skip
        total += more
        moment += more_moment
    else:
        columns = column + tl.arange(0, products.shape[1])
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + columns, mask=columns < vocabulary, other=0.0)
            products += bias.to(tl.float32)[None, :]
        shifted, slope = exponents(
            products, scale[:, None], softcap, to_log2[:, None], reference[:, None]
        )
        left_out = (columns[None, :] == target[:, None]) | (columns[None, :] >= vocabulary)
        exponentials = tl.where(left_out, 0.0, tl.exp2(shifted))
        total = tl.sum(exponentials, 1)
        moment = tl.zeros_like(total)
        if HAS_MOMENT:
            moment = tl.sum(exponentials * tl.maximum(shifted, LEAST), 1) * LN2
        if e_desc is not None:
            if STORES_SLOPE:
                exponentials *= slope
            e_desc.store([row, column], exponentials.to(e_desc.dtype))
    return total, moment


# Of a vocabulary that 16 divides, Triton 3.6 packs the epilogue's comparisons into bits: 350 more
# instructions in 1,400, and 39 more registers
@triton.jit(do_not_specialize=["rows", "vocabulary"])
def exp_product_kernel(
    e_desc, sums_ptr, moments_ptr,  # outputs [N, V], [tiles of V, N], again; None if not wanted
    x_desc, w_desc, bias_ptr,  # inputs [N, H], [V, H], [V] or None
    targets_ptr, references_ptr, rows, vocabulary, width,  # inputs [N]
    scale, softcap, temperature_ptr, temperature_stride,  # number, it or None, [N] or [1]
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, PIECES: tl.constexpr, STORES_SLOPE: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, BLOCK_N)
    column_tiles = tl.cdiv(vocabulary, BLOCK_V)
    steps = tl.cdiv(width, BLOCK_H)
    tl.assume(steps > 0)
    of_group = GROUP * column_tiles
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=True):
        first = tile // of_group * GROUP
        group = min(row_tiles - first, GROUP)
        row = (first + (tile % of_group) % group) * BLOCK_N
        column_tile = (tile % of_group) // group
        column = column_tile * BLOCK_V
        products = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for step in range(steps):
            x = x_desc.load([row, step * BLOCK_H])
            w = w_desc.load([column, step * BLOCK_H])
            products = tl.dot(x, w.T, products, input_precision="ieee")
        at = row + tl.arange(0, BLOCK_N)
        inside = at < rows
        target = tl.load(targets_ptr + at, mask=inside, other=-1).to(tl.int32)
        reference = tl.load(references_ptr + at, mask=inside, other=0.0) * LOG2E
        to_log2 = LOG2E / tl.load(temperature_ptr + at * temperature_stride, mask=inside, other=1.0)
        scales = tl.zeros_like(to_log2) + scale
        total, moment = finish_tile(
            products, row, column, target, reference, to_log2, scales, softcap, vocabulary,
            bias_ptr, e_desc, PIECES, moments_ptr is not None, STORES_SLOPE, PIECES > 2,
        )  # fmt: skip
        slot = column_tile.to(tl.int64) * rows + at
        if sums_ptr is not None:
            tl.store(sums_ptr + slot, total, mask=inside)
        if moments_ptr is not None:
            tl.store(moments_ptr + slot, moment, mask=inside)


@dataclass(frozen=True)
class Tile:
    """How the product is cut: rows by columns in steps of depth, row tiles by the group."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int


# By compute capability. On an H100 the first was fastest of twelve at H = 4096, and at H = 1024
# and 8192 within 1 % of the library's product or ahead of it, so no entry differs by H. The others
# are what compiles without a spill, not yet measured. Devices that are not here have no copy engine
# that Triton drives (descriptors become plain loads that it does not prefetch), or too little
# shared memory: they take the library's product and `exp_rows_kernel`.
TILES = {
    (9, 0): Tile(128, 256, 64, group=8, warps=8, stages=3),
    (10, 0): Tile(256, 128, 64, group=8, warps=8, stages=3),
    (10, 3): Tile(256, 128, 64, group=8, warps=8, stages=3),
}


@cache
def tile_of_device(device: torch.device) -> Tile | None:
    """The tile for a device; None where the product is the library's."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return TILES.get(torch.cuda.get_device_capability(device))


def tile_for(weight: Tensor) -> Tile | None:
    """Choose between the fused product and the library's (None), here and nowhere else.

    Fused for bf16, whose range holds the exponentials, on devices that have a tile. The copy engine
    wants rows that begin at multiples of 16 bytes, those of the hidden states too: H divisible by
    8. fp16 and fp32 take the library's product in fp32, and exponentials in fp32.
    """
    fits = weight.dtype == torch.bfloat16 and weight.shape[1] % 8 == 0 and can_describe(weight)
    return tile_of_device(weight.device) if fits else None


def can_describe(values: Tensor) -> bool:
    """Whether the copy engine can walk a matrix, whose rows must not overlap."""
    steps = (values.data_ptr(), values.stride(0) * values.element_size())
    apart = values.stride(1) == 1 and values.stride(0) >= values.shape[1]
    return apart and all(step % 16 == 0 for step in steps)


def blocks(tile: Tile, *, rich: bool) -> dict[str, int]:
    """The constants of a tile; an epilogue with a cap or moments needs smaller pieces."""
    return {
        "BLOCK_N": tile.rows,
        "BLOCK_V": tile.columns,
        "BLOCK_H": tile.depth,
        "GROUP": tile.group,
        "PIECES": 4 if rich else 2,
    }


def exp_product(
    exponentials: Tensor | None,
    chunk: Chunk,
    references: Tensor,
    tile: Tile,
    *,
    sums: bool,
    moments: bool,
    stores_slope: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the product; return sums and moments of the column tiles. Shape [tiles, N].

    An empty slice of the vocabulary has no tile, and nothing is launched.

    Args:
        exponentials: Where E goes; None: it is not kept. Shape [N, V].
        chunk: The rows.
        references: The logit that the exponentials of each row are taken relative to. Shape [N].
        tile: How the product is cut.
        sums: Whether sums are wanted.
        moments: Whether moments are wanted too.
        stores_slope: Whether to multiply what is stored by the cap's slope.
    """
    (rows, width), vocabulary = chunk.hidden.shape, len(chunk.weight)
    tiles = triton.cdiv(vocabulary, tile.columns)
    totals = [references.new_empty((tiles, rows)) if some else None for some in (sums, moments)]
    if not tiles:
        return totals[0], totals[1]
    sizes = blocks(tile, rich=chunk.has_cap or moments)
    stored = None
    if exponentials is not None:
        box = [tile.rows, tile.columns // sizes["PIECES"]]
        stored = TensorDescriptor.from_tensor(exponentials, box)
    programs = multiprocessors(chunk.hidden.device)
    exp_product_kernel[(min(programs, triton.cdiv(rows, tile.rows) * tiles),)](
        stored,
        *totals,
        TensorDescriptor.from_tensor(chunk.hidden, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(chunk.weight, [tile.columns, tile.depth]),
        chunk.bias,
        chunk.columns,
        references,
        rows,
        vocabulary,
        width,
        *chunk.to_logits,
        **sizes,
        PROGRAMS=programs,
        STORES_SLOPE=stores_slope,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return totals[0], totals[1]
