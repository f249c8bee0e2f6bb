"""Every Triton kernel compiles ahead of time for the GPUs we name, and spills no register.

No GPU is needed: triton ships the assemblers. What the compiler says is read from the binaries.
"""

import json
import re
from typing import Any

import pytest
import triton

from benchmarks.triton_resources import (
    BACKWARD,
    FORWARD,
    RECORDED,
    ROW_KERNELS,
    TARGETS,
    Variant,
    resources,
    row_variant,
    source,
    variants,
)
from igrpo_kernels._triton import softmax_rows as kernels


def assembly(variant: Variant, name: str = "sm_90") -> dict[str, Any]:
    compiled = triton.compile(source(variant), target=TARGETS[name], options=variant.options)
    return compiled.asm  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("variant", list(variants()), ids=str)
def test_no_kernel_spills(variant: Variant, name: str) -> None:
    registers, spilled = resources(variant, name)
    assert spilled == 0
    assert 0 < registers <= 128  # two blocks of 256 threads on a multiprocessor at least


def test_the_recorded_table_holds_every_kernel_and_no_spill() -> None:
    recorded = json.loads(RECORDED.read_text())["registers and spilled bytes"]
    assert sorted(recorded) == sorted(map(str, variants()))
    for targets in recorded.values():
        assert sorted(targets) == sorted(TARGETS)
        assert all(registers > 0 and spilled == 0 for registers, spilled in targets.values())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_forward_takes_little_more_than_one_exponential_a_logit(
    aligned: bool, dtype: str, masked: bool
) -> None:
    variant = row_variant(FORWARD, dtype, ("ALIGNED",) * aligned + ("HAS_MASK",) * masked)
    ptx = assembly(variant)["ptx"]
    logits = kernels.BLOCK_V // (32 * kernels.LAUNCH["num_warps"])  # of a thread, in each step
    lanes = logits // variant.constants["LANE_WIDTH"]
    # one rescale a lane, and one where the lanes merge; rescaling with each logit takes twice
    assert 0 < ptx.count("ex2.approx") <= logits + 2 * lanes
    assert ("ld.global.v4.b32" in ptx) == aligned
    assert ptx.count("shfl") <= 16  # the lanes' maximum and sum merge once, after the loop


@pytest.mark.parametrize("name", TARGETS)
def test_products_are_loaded_before_half_their_width_is_written_over(name: str) -> None:
    ttgir = assembly(row_variant(BACKWARD, "bf16", ("NARROWS",)), name)["ttgir"]
    loop = ttgir[ttgir.index("scf.for") :]
    assert loop.index("tt.load") < loop.index("barrier") < loop.index("tt.store")


@pytest.mark.parametrize("kernel", ROW_KERNELS, ids=lambda kernel: kernel.fn.__name__)
def test_rows_are_addressed_in_64_bits_fla_1082_trl_7266(kernel: Any) -> None:
    ttir = assembly(row_variant(kernel, "bf16", ()))["ttir"]
    row = re.search(r"(%\S+) = tt.get_program_id x", ttir)
    assert row is not None
    # the row is widened before it meets a stride, and no 32-bit product takes part in an address
    assert re.search(rf"arith.extsi {row[1]} : i32 to i64", ttir)
    assert not re.search(r"arith.muli .* : i32", ttir)
