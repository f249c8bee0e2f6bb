"""Every Triton kernel compiles ahead of time for the GPUs we name, and spills no register.

No GPU is needed: triton ships the assemblers. What the compiler says is read from the binaries.
"""

import json
import re
from typing import Any

import pytest

from benchmarks.triton_resources import (
    BACKWARD,
    EXP_ROWS,
    FORWARD,
    PRODUCT,
    RECORDED,
    Variant,
    compiled,
    resources,
    variants,
)

EVERY = [(launch, target) for launch in variants() for target in launch.targets]


@pytest.mark.parametrize(("launch", "target"), EVERY, ids=str)
def test_no_kernel_spills(launch: Variant, target: str) -> None:
    registers, spilled = resources(launch, target)
    assert spilled == 0
    # the product holds its tile in registers: one block on a multiprocessor; the others share it
    assert 0 < registers <= (255 if launch.kernel is PRODUCT else 128)


def test_the_recorded_table_holds_every_kernel_and_no_spill() -> None:
    recorded = json.loads(RECORDED.read_text())["registers and spilled bytes"]
    assert recorded.keys() == {str(launch) for launch in variants()}
    for launch in variants():
        targets = recorded[str(launch)]
        assert sorted(targets) == sorted(launch.targets)
        assert all(registers > 0 and spilled == 0 for registers, spilled in targets.values())


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD, EXP_ROWS], ids=lambda k: k.fn.__name__)
def test_rows_are_addressed_in_64_bits_fla_1082_trl_7266(kernel: Any) -> None:
    launch = next(each for each in variants() if each.kernel is kernel)
    ttir = compiled(launch, "sm_90").asm["ttir"]
    row = re.search(r"(%\S+) = tt.get_program_id x", ttir)
    assert row is not None
    # the row is widened before it meets a stride
    assert re.search(rf"arith.extsi {row[1]} : i32 to i64", ttir)
