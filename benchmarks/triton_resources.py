"""Registers and spilled bytes of every Triton kernel, as the compilers report them without a GPU.

    python -m benchmarks.triton_resources

writes benchmarks/results/triton_resources.json, which a test compares with what compiles: every
kernel and target must be there, and none may spill. Exact registers are the compiler's business.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from igrpo_kernels._triton import clipped_policy_loss as clipped
from igrpo_kernels._triton import softmax_rows

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
RECORDED = Path(__file__).resolve().parent / "results" / "triton_resources.json"
FORWARD, BACKWARD = softmax_rows.softmax_rows_fwd_kernel, softmax_rows.softmax_rows_bwd_kernel
ROW_KERNELS = [FORWARD, BACKWARD]
FLAGS = ("ALIGNED", "HAS_MASK", "HAS_ENTROPY", "HAS_SOFTCAP", "IS_SLICE", "NARROWS")
FLAG_SETS: list[tuple[Any, tuple[str, ...]]] = [
    (FORWARD, ()),
    (FORWARD, ("ALIGNED",)),
    (FORWARD, ("HAS_MASK", "HAS_ENTROPY")),
    (FORWARD, ("ALIGNED", "HAS_MASK", "HAS_ENTROPY", "HAS_SOFTCAP")),
    (FORWARD, ("HAS_ENTROPY", "HAS_SOFTCAP", "IS_SLICE")),
    (BACKWARD, ()),
    (BACKWARD, ("HAS_MASK", "HAS_ENTROPY")),
    (BACKWARD, ("HAS_MASK", "HAS_ENTROPY", "HAS_SOFTCAP")),
    (BACKWARD, ("HAS_ENTROPY", "NARROWS")),
]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SCALARS = ("logit_scale", "softcap", "low", "high", "dual")


@dataclass(frozen=True)
class Variant:
    """A kernel as one kind of launch compiles it."""

    kernel: Any
    dtype: str
    constants: dict[str, Any]
    options: dict[str, Any]

    def __str__(self) -> str:
        flags = [name for name in FLAGS if self.constants.get(name)]
        return " ".join([self.kernel.fn.__name__, self.dtype, *flags])


def argument_type(name: str, variant: Variant) -> str:
    """The type under which a launch passes an argument."""
    if name == "products_ptr" and variant.constants.get("NARROWS"):
        return "*fp32"
    if name in ("products_ptr", "grad_ptr"):
        return f"*{variant.dtype}"
    if name.endswith("_ptr"):
        return {"targets_ptr": "*i64", "mask_ptr": "*i1"}.get(name, "*fp32")
    return "fp32" if name in SCALARS else "i32"  # an int below 2^31 is passed in 32 bits


def source(variant: Variant) -> ASTSource:
    """What a launch of the variant compiles."""
    names = variant.kernel.arg_names
    signature = {
        name: "constexpr" if name in variant.constants else argument_type(name, variant)
        for name in names
    }
    at = {(names.index(name),): value for name, value in variant.constants.items()}
    known = [name for name in names if name.endswith("_ptr")]
    if variant.constants.get("ALIGNED"):
        known += ["vocabulary", "outer_stride", "inner_stride"]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in known}
    attrs = {index: attr for index, attr in attrs.items() if index not in at}
    return ASTSource(fn=variant.kernel, signature=signature, constexprs=at, attrs=attrs)


def row_variant(kernel: Any, dtype: str, flags: tuple[str, ...]) -> Variant:
    """A row kernel with some of `FLAGS` set."""
    constants: dict[str, Any] = {name: name in flags for name in FLAGS}
    logits = torch.empty(2, 151936 if "ALIGNED" in flags else 50257, dtype=DTYPES[dtype])
    constants |= softmax_rows.lanes(logits, softmax_rows.RowLayout.of(logits))
    constants["BLOCK_V"] = softmax_rows.BLOCK_V
    if "HAS_MASK" not in flags:
        constants["mask_ptr"] = None
    if "HAS_ENTROPY" not in flags and kernel is BACKWARD:
        constants |= {"entropy_ptr": None, "grad_entropy_ptr": None}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return Variant(kernel, dtype, constants, softmax_rows.LAUNCH)


def variants() -> Iterator[Variant]:
    """Every kernel, as the launches of this library compile it."""
    for kernel, flags in FLAG_SETS:
        for dtype in ("bf16",) if "NARROWS" in flags else ("bf16", "fp32"):
            yield row_variant(kernel, dtype, flags)
    kernel, constants = clipped.clipped_policy_loss_kernel, {"BLOCK": clipped.BLOCK}
    yield Variant(kernel, "fp32", constants, {"enable_fp_fusion": True})


def cuda_resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes it spills."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [CUOBJDUMP, "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return int(values["REG"]), int(values["STACK"]) + int(values["LOCAL"])


def hip_resources(assembly: str) -> tuple[int, int]:
    """Vector registers of a thread, and the bytes it spills."""
    (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", assembly)
    spills = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", assembly)
    assert len(spills) == 2
    return int(registers), 4 * sum(map(int, spills))


def resources(variant: Variant, target: str) -> tuple[int, int]:
    """Compile; return the registers of a thread and the bytes it spills."""
    chosen = TARGETS[target]
    compiled = triton.compile(source(variant), target=chosen, options=variant.options)
    if chosen.backend == "hip":
        return hip_resources(compiled.asm["amdgcn"])
    return cuda_resources(compiled.asm["cubin"])


def table() -> dict[str, Any]:
    """[registers, spilled bytes] by kernel and target."""
    kernels = {
        str(variant): {target: list(resources(variant, target)) for target in TARGETS}
        for variant in variants()
    }
    return {"triton": triton.__version__, "registers and spilled bytes": kernels}


def main() -> int:
    """Write the table and print it; return 1 where something spills."""
    found = table()
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")
    kernels = found["registers and spilled bytes"]
    for name, targets in kernels.items():
        cells = [
            f"{target} {regs} registers, {spilled} B" for target, (regs, spilled) in targets.items()
        ]
        print(f"{name:80} {'   '.join(cells)}")
    return int(any(spilled for targets in kernels.values() for _, spilled in targets.values()))


if __name__ == "__main__":
    sys.exit(main())
