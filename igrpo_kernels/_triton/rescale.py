# mypy: disable-error-code="no-untyped-def"
"""A gradient times the upstream scalar, which is 1 nearly always: then nothing is read or written.

The scalar is read on the device, so no host waits for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
PROGRAMS = 1024


@triton.jit
def rescale_kernel(values_ptr, scalar_ptr, count, BLOCK: tl.constexpr):
    """Multiply values [count] in place; a scalar of 1 leaves no block to walk."""
    scalar = tl.load(scalar_ptr).to(tl.float32)
    end = tl.where(scalar == 1.0, 0, count)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, end, step):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + at, mask=at < count, other=0.0)
        scaled = (values.to(tl.float32) * scalar).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + at, scaled, mask=at < count)


def rescale_(values: Tensor, scalar: Tensor) -> Tensor:
    """Multiply values by a scalar, in place."""
    if not values.is_contiguous():
        return values.mul_(scalar)
    programs = min(PROGRAMS, triton.cdiv(values.numel(), BLOCK))
    if programs:
        with torch.cuda.device_of(values):
            rescale_kernel[(programs,)](
                values, scalar, values.numel(), BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True
            )
    return values
