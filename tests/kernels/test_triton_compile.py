"""Every Triton kernel compiles ahead of time for the GPUs we name, and spills no register.

No GPU is needed: triton ships the assemblers. What the compiler says is read from the binaries.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from igrpo_kernels._triton import clipped_policy_loss as clipped
from igrpo_kernels._triton import softmax_rows as kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FLAGS = ("HAS_MASK", "HAS_ENTROPY", "HAS_SOFTCAP", "IS_SLICE")
FLAG_SETS = [
    (False, False, False, False),
    (True, True, False, False),
    (True, True, True, False),
    (False, True, True, True),
]
ROW_KERNELS = [kernels.softmax_rows_fwd_kernel, kernels.softmax_rows_bwd_kernel]
THREADS = 32 * kernels.LAUNCH["num_warps"]
SCALARS = ("logit_scale", "softcap", "low", "high", "dual")


def argument_type(name: str, dtype: str) -> str:
    """The type under which a launch passes an argument."""
    if name in ("products_ptr", "grad_ptr"):
        return f"*{dtype}"
    if name.endswith("_ptr"):
        return {"targets_ptr": "*i64", "mask_ptr": "*i1"}.get(name, "*fp32")
    return "fp32" if name in SCALARS else "i32"  # an int below 2^31 is passed in 32 bits


def source(kernel: Any, dtype: str, constants: dict[str, Any]) -> ASTSource:
    """What a launch with these constants compiles; a kernel takes those that it knows."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants else argument_type(name, dtype)
        for name in kernel.arg_names
    }
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(fn=kernel, signature=signature, constexprs=at)


def cuda_resources(cubin: Path) -> tuple[int, int]:
    """Registers of a thread, and the bytes it spills."""
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    values = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return int(values["REG"]), int(values["STACK"]) + int(values["LOCAL"])


def hip_resources(assembly: str) -> tuple[int, int]:
    """Vector registers of a thread, and the bytes it spills."""
    (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", assembly)
    spills = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly)
    assert len(spills) == 2
    return int(registers), 4 * sum(map(int, spills))


def check(src: ASTSource, name: str, options: dict[str, Any], folder: Path) -> None:
    target = TARGETS[name]
    compiled = triton.compile(src, target=target, options=options)
    if target.backend == "hip":
        registers, spilled = hip_resources(compiled.asm["amdgcn"])
    else:
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        registers, spilled = cuda_resources(cubin)
    assert spilled == 0
    assert 0 < registers <= 128  # two blocks of 256 threads on a multiprocessor at least


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("flags", FLAG_SETS)
@pytest.mark.parametrize("kernel", ROW_KERNELS, ids=lambda kernel: kernel.fn.__name__)
def test_row_kernels(
    kernel: Any, flags: tuple[bool, ...], dtype: str, name: str, tmp_path: Path
) -> None:
    constants: dict[str, Any] = dict(zip(FLAGS, flags, strict=True))
    constants["BLOCK_V"] = kernels.BLOCK_V
    has_mask, has_entropy, *_ = flags
    if kernel is kernels.softmax_rows_fwd_kernel:
        constants |= {"LANE_WIDTH": kernels.BLOCK_V // THREADS, "ALIGNED": False}
    if not has_mask:
        constants["mask_ptr"] = None
    if kernel is kernels.softmax_rows_bwd_kernel:
        constants["NARROWS"] = False
        if not has_entropy:
            constants |= {"entropy_ptr": None, "grad_entropy_ptr": None}
    check(source(kernel, dtype, constants), name, kernels.LAUNCH, tmp_path)


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("vocabulary", [50257, 151936])
def test_the_forward_takes_little_more_than_one_exponential_a_logit(
    vocabulary: int, dtype: str, has_mask: bool
) -> None:
    kernel = kernels.softmax_rows_fwd_kernel
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    logits = torch.empty(2, vocabulary, dtype=dtypes[dtype])
    lanes = kernels.lanes(logits, kernels.RowLayout.of(logits))
    constants = dict.fromkeys(FLAGS, False) | {"BLOCK_V": kernels.BLOCK_V, "HAS_MASK": has_mask}
    constants |= lanes if has_mask else lanes | {"mask_ptr": None}
    src = source(kernel, dtype, constants)
    aligned = [name for name in kernel.arg_names if name.endswith("_ptr")]
    if vocabulary % 16 == 0:  # what a launch finds of its arguments
        aligned += ["vocabulary", "outer_stride", "inner_stride"]
    for name in set(aligned) - constants.keys():
        src.attrs[(kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
    ptx = triton.compile(src, target=TARGETS["sm_90"], options=kernels.LAUNCH).asm["ptx"]
    of_thread = kernels.BLOCK_V // THREADS
    # one rescale a lane, and one where the lanes merge; rescaling with each logit takes twice
    assert 0 < ptx.count("ex2.approx") <= of_thread + 2 * of_thread // lanes["LANE_WIDTH"]
    assert ("ld.global.v4.b32" in ptx) == (vocabulary % 16 == 0)
    assert ptx.count("shfl") <= 16  # the lanes' maximum and sum merge once, after the loop


@pytest.mark.parametrize("name", TARGETS)
def test_gradient_over_the_products_in_half_their_width(name: str, tmp_path: Path) -> None:
    kernel = kernels.softmax_rows_bwd_kernel
    constants = dict.fromkeys(FLAGS, False) | {"NARROWS": True, "BLOCK_V": kernels.BLOCK_V}
    constants |= {"mask_ptr": None, "entropy_ptr": None, "grad_entropy_ptr": None}
    src = source(kernel, "fp32", constants)
    src.signature["grad_ptr"] = "*bf16"
    check(src, name, kernels.LAUNCH, tmp_path)
    ttgir = triton.compile(src, target=TARGETS[name], options=kernels.LAUNCH).asm["ttgir"]
    loop = ttgir[ttgir.index("scf.for") :]
    # every thread has its products before any thread writes over them
    assert loop.index("tt.load") < loop.index("barrier") < loop.index("tt.store")


@pytest.mark.parametrize("name", TARGETS)
def test_clipped_policy_loss(name: str, tmp_path: Path) -> None:
    src = source(clipped.clipped_policy_loss_kernel, "fp32", {"BLOCK": clipped.BLOCK})
    check(src, name, {"enable_fp_fusion": True}, tmp_path)


@pytest.mark.parametrize("kernel", ROW_KERNELS, ids=lambda kernel: kernel.fn.__name__)
def test_rows_are_addressed_in_64_bits_fla_1082_trl_7266(kernel: Any) -> None:
    constants: dict[str, Any] = dict.fromkeys((*FLAGS, "NARROWS"), False)
    constants |= {"mask_ptr": None, "entropy_ptr": None, "grad_entropy_ptr": None}
    constants |= {"BLOCK_V": kernels.BLOCK_V, "LANE_WIDTH": 8, "ALIGNED": True}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    options = kernels.LAUNCH
    compiled = triton.compile(source(kernel, "bf16", constants), TARGETS["sm_90"], options)
    row = re.search(r"(%\S+) = tt.get_program_id x", compiled.asm["ttir"])
    assert row is not None
    # the row is widened before it meets a stride, and no 32-bit product takes part in an address
    assert re.search(rf"arith.extsi {row[1]} : i32 to i64", compiled.asm["ttir"])
    assert not re.search(r"arith.muli .* : i32", compiled.asm["ttir"])
