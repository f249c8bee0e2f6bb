"""Every Triton kernel compiles ahead of time for the GPUs we name, and spills no register.

No GPU is needed: triton ships the assemblers. What the compiler says is read from the binaries.
"""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.triton_resources import (
    EXP_ROWS,
    FORWARD,
    PRODUCT,
    RECORDED,
    TARGETS,
    Variant,
    argument_type,
    compiled,
    for_target,
    launches_of,
    resources,
    variants,
)
from igrpo_kernels._triton import exp_product, logit_rows


def assembly(launch: Variant, name: str = "sm_90") -> dict[str, Any]:
    return compiled(launch, name).asm  # type: ignore[no-any-return]


# Bytes at most, in loops that only rows out of range enter: of other tiles, and ways to step along
# the operands, none is free of spills with every Triton
SPILLED = {"row_totals_kernel": 72}


@pytest.mark.parametrize("launch", list(variants()), ids=str)
def test_no_kernel_spills_or_asks_for_memory(launch: Variant) -> None:
    name = launch.kernel.fn.__name__
    for target in launch.targets:
        # Triton takes it from an allocator of the launching thread: autograd's threads have none
        assert compiled(launch, target).metadata.global_scratch_size == 0
        registers, spilled = resources(launch, target)
        assert spilled <= SPILLED.get(name, 0), target
        warps = for_target(launch, target).options.get("num_warps", 4)
        # a block of the product fills the 64 Ki registers of a multiprocessor; of the row kernels
        # two of 256 threads fit at least
        limit = 255 if launch.is_product or name == "row_totals_kernel" else 128
        assert 0 < registers <= limit, target
        assert registers * 32 * warps <= 2**16 or target == "gfx942"


def test_the_recorded_table_holds_every_kernel_and_no_other_spill() -> None:
    recorded = json.loads(RECORDED.read_text())["registers and spilled bytes"]
    assert sorted(recorded) == sorted(map(str, variants()))
    for launch in variants():
        targets = recorded[str(launch)]
        assert sorted(targets) == sorted(launch.targets)
        limit = SPILLED.get(launch.kernel.fn.__name__, 0)
        assert all(registers > 0 and spilled <= limit for registers, spilled in targets.values())


def test_the_product_runs_on_tensor_cores_and_the_copy_engine() -> None:
    ptx = assembly(launches_of(PRODUCT, "e_desc sums_ptr")[0])["ptx"]
    assert "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16" in ptx
    assert "cp.async.bulk.tensor.2d.shared::c" in ptx  # operands in
    assert "cp.async.bulk.tensor.2d.global.shared::cta" in ptx  # exponentials out
    assert "cvt.rn.bf16x2.f32" in ptx  # rounded, not truncated
    assert "tcgen05.mma" in assembly(launches_of(PRODUCT, "e_desc sums_ptr")[0], "sm_100")["ptx"]


@pytest.mark.parametrize("launch", launches_of(PRODUCT), ids=str)
def test_the_epilogue_takes_one_exponential_a_logit(launch: Variant) -> None:
    sizes = for_target(launch, "sm_90").constants
    logits = sizes["BLOCK_N"] * sizes["BLOCK_V"] // (32 * exp_product.TILES[9, 0].warps)
    each = 2 if "softcap" in launch.chosen else 1  # and one for the cap's tanh
    assert assembly(launch)["ptx"].count("ex2.approx") == each * logits


def test_forward_alone_stores_no_exponential() -> None:
    ptx = assembly(launches_of(PRODUCT, "sums_ptr")[0])["ptx"]
    assert "cp.async.bulk.tensor.2d.global.shared::cta" not in ptx


@pytest.mark.parametrize("launch", launches_of(FORWARD), ids=str)
def test_the_forward_takes_one_exponential_a_logit(launch: Variant) -> None:
    ptx = assembly(launch)["ptx"]
    logits = logit_rows.BLOCK_V // (32 * logit_rows.LAUNCH["num_warps"])  # of a thread, each step
    # in the loop, again in that of rows out of range, and one of the target's
    assert 2 * logits <= ptx.count("ex2.approx") <= 2 * logits + 2
    assert ptx.count("shfl") <= 60  # sums merge after a loop


@pytest.mark.parametrize("name", TARGETS)
def test_products_are_loaded_before_half_their_width_is_written_over(name: str) -> None:
    ttgir = assembly(launches_of(EXP_ROWS, "e_ptr NARROWS")[0], name)["ttgir"]
    loop = ttgir[ttgir.index("scf.for") :]
    assert loop.index("tt.load") < loop.index("barrier") < loop.index("tt.store")


@pytest.mark.parametrize(
    "launch", [launch for launch in variants() if not launch.is_product], ids=str
)
def test_rows_are_addressed_in_64_bits_fla_1082_trl_7266(launch: Variant) -> None:
    ttir = assembly(launch)["ttir"]
    row = re.search(r"(%\S+) = tt.get_program_id x", ttir)
    assert row is not None
    # the row is widened before it meets a stride, and no 32-bit product takes part in an address
    assert re.search(rf"arith.extsi {row[1]} : i32 to i64", ttir)
    assert not re.search(r"arith.muli .* : (i32|tensor<[0-9x]+xi32>)", ttir)


LAST_OF_EACH = {launch.kernel.fn.__name__: launch for launch in variants()}


@pytest.mark.parametrize("name", LAST_OF_EACH)
def test_sizes_and_strides_of_one_compile(name: str) -> None:
    # Triton makes constants of them, which lack what its numbers can do; the interpreter does not
    launch = for_target(LAST_OF_EACH[name], "sm_90")
    given = {*launch.constants, *(launch.kernel.do_not_specialize or ())}
    free = [name for name in launch.kernel.arg_names if name not in given]
    sizes = [name for name in free if argument_type(name, launch) == "i32"]
    assert sizes
    compiled(replace(launch, constants=launch.constants | dict.fromkeys(sizes, 1)), "sm_90")
