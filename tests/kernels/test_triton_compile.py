"""Every Triton kernel compiles ahead of time for the GPUs we name, and spills no register.

No GPU is needed: triton ships the assemblers. What the compiler says is read from the binaries.
"""

import json
import re
from typing import Any

import pytest
import triton

from benchmarks.triton_resources import (
    FLAG_SETS,
    FLAGS,
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


def check(variant: Variant, target: str) -> None:
    registers, spilled = resources(variant, target)
    assert spilled == 0
    assert 0 < registers <= 128  # two blocks of 256 threads on a multiprocessor at least


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("flags", FLAG_SETS)
@pytest.mark.parametrize("kernel", ROW_KERNELS, ids=lambda kernel: kernel.fn.__name__)
def test_row_kernels(kernel: Any, flags: tuple[bool, bool, bool], dtype: str, name: str) -> None:
    check(row_variant(kernel, dtype, flags), name)


@pytest.mark.parametrize("name", TARGETS)
def test_clipped_policy_loss(name: str) -> None:
    (variant,) = (each for each in variants() if each.kernel not in ROW_KERNELS)
    check(variant, name)


def test_the_recorded_table_holds_every_kernel_and_no_spill() -> None:
    recorded = json.loads(RECORDED.read_text())["registers and spilled bytes"]
    assert sorted(recorded) == sorted(map(str, variants()))
    for targets in recorded.values():
        assert sorted(targets) == sorted(TARGETS)
        assert all(registers > 0 and spilled == 0 for registers, spilled in targets.values())


@pytest.mark.parametrize("kernel", ROW_KERNELS, ids=lambda kernel: kernel.fn.__name__)
def test_rows_are_addressed_in_64_bits_fla_1082(kernel: Any) -> None:
    constants: dict[str, Any] = dict.fromkeys(FLAGS, False) | {"BLOCK_V": kernels.BLOCK_V}
    constants |= {"mask_ptr": None, "entropy_ptr": None, "grad_entropy_ptr": None}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    variant = Variant(kernel, "bf16", constants, kernels.LAUNCH)
    compiled = triton.compile(source(variant), TARGETS["sm_90"], variant.options)
    row = re.search(r"(%\S+) = tt.get_program_id x", compiled.asm["ttir"])
    assert row is not None
    # the row is widened before it meets a stride, and no 32-bit product takes part in an address
    assert re.search(rf"arith.extsi {row[1]} : i32 to i64", compiled.asm["ttir"])
    assert not re.search(r"arith.muli .* : i32", compiled.asm["ttir"])
