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

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from igrpo_kernels._triton import (
    clip_terms,
    exp_product,
    exp_rows,
    head_rows,
    logit_rows,
    rescale,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The fused product runs where there is a tile for it; elsewhere the product is the library's
TILES = {"sm_90": exp_product.TILES[9, 0], "sm_100": exp_product.TILES[10, 0]}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
RECORDED = Path(__file__).resolve().parent / "results" / "triton_resources.json"
# Which pointers are None where a flag is off
POINTERS = {
    "HAS_BIAS": ("bias_ptr",),
    "HAS_MASK": ("mask_ptr",),
    "HAS_SUMS": ("sums_ptr",),
    "HAS_MOMENT": ("moments_ptr", "entropy_ptr"),
    "HAS_ENTROPY": ("entropy_ptr", "by_entropy_ptr"),
    "HAS_LOGPROB": ("by_logprob_ptr",),
    "HAS_OLD": ("old_ptr",),
    "HAS_REF": ("ref_ptr",),
    "HAS_IMPORTANCE": ("importance_ptr",),
    "HAS_WEIGHTS": ("weights_ptr",),
    "HAS_LOSSES": ("losses_ptr",),
    "HAS_SLOPES": ("slopes_ptr",),
    "HAS_ROWS": ("rows_ptr",),
    "HAS_GRADIENT": ("factors_ptr", "scaled_ptr", "e_ptr"),
    "SCALES": ("scaled_ptr",),
    "STORES": ("e_ptr", "e_desc"),
}
OTHER_FLAGS = ("HAS_SOFTCAP", "STORES_SLOPE", "NARROWS", "IS_WEIGHED", "WIDE")
FLAGS = (*POINTERS, *OTHER_FLAGS)
OF_DTYPE = (
    "x_ptr",
    "w_ptr",
    "bias_ptr",
    "e_ptr",
    "scaled_ptr",
    "out_ptr",
    "logits_ptr",
    "grad_ptr",
)
TYPES = {"targets_ptr": "*i64", "rows_ptr": "*i64", "mask_ptr": "*i1"}
SCALARS = ("scale", "softcap", "low", "high", "dual", "kl_coef")

PRODUCT = exp_product.exp_product_kernel
TOTALS = exp_rows.row_totals_kernel
EXP_ROWS = exp_rows.exp_rows_kernel
FORWARD, BACKWARD = logit_rows.logit_rows_fwd_kernel, logit_rows.logit_rows_bwd_kernel
ROW_BLOCKS = {"BLOCK_V": exp_rows.BLOCK_V, "BLOCK_H": exp_rows.BLOCK_H}
WIDE = {"num_warps": 8}
# The kernels, their block sizes and options, and the flags of some launches of each
LAUNCHES: list[tuple[Any, dict[str, int], dict[str, int], list[str]]] = [
    (
        exp_rows.target_logits_kernel,
        ROW_BLOCKS,
        {},
        ["", "HAS_BIAS HAS_SOFTCAP"],
    ),
    (
        EXP_ROWS,
        ROW_BLOCKS,
        WIDE,
        ["", "STORES NARROWS", "STORES HAS_BIAS HAS_SOFTCAP HAS_MOMENT STORES_SLOPE"],
    ),
    (
        TOTALS,
        {name: size for name, size in exp_rows.TOTALS.items() if name.startswith("BLOCK")},
        {name: size for name, size in exp_rows.TOTALS.items() if name.startswith("num")},
        ["", "STORES", "STORES STORES_SLOPE HAS_BIAS HAS_SOFTCAP HAS_MOMENT"],
    ),
    (head_rows.weigh_rows_kernel, ROW_BLOCKS, WIDE, ["HAS_SOFTCAP", "HAS_ENTROPY HAS_LOGPROB"]),
    (head_rows.gradient_rows_kernel, ROW_BLOCKS, {}, ["", "SCALES HAS_SOFTCAP", "IS_WEIGHED"]),
    (
        head_rows.clip_rows_kernel,
        ROW_BLOCKS,
        {},
        ["", "HAS_OLD HAS_GRADIENT SCALES", "HAS_ROWS HAS_OLD HAS_REF HAS_IMPORTANCE HAS_GRADIENT"],
    ),
    (head_rows.scale_rows_kernel, ROW_BLOCKS, {}, ["", "HAS_ROWS"]),
    (rescale.rescale_kernel, {"BLOCK": rescale.BLOCK}, WIDE, [""]),
    (
        clip_terms.clip_tokens_kernel,
        {"BLOCK": clip_terms.BLOCK},
        WIDE,
        [
            "HAS_OLD HAS_LOSSES HAS_SLOPES",
            "HAS_MASK HAS_OLD HAS_REF HAS_IMPORTANCE HAS_WEIGHTS HAS_SLOPES HAS_SUMS",
        ],
    ),
    (FORWARD, {"BLOCK_V": logit_rows.BLOCK_V}, WIDE, ["", "HAS_MASK HAS_ENTROPY"]),
    (
        BACKWARD,
        {"BLOCK_V": logit_rows.BLOCK_V},
        WIDE,
        ["HAS_LOGPROB", "HAS_MASK HAS_LOGPROB HAS_ENTROPY"],
    ),
]
PRODUCTS = [
    "STORES HAS_SUMS",
    "HAS_SUMS",
    "STORES",
    "STORES HAS_SUMS HAS_BIAS",
    "HAS_SUMS HAS_MOMENT",
    "STORES HAS_SUMS HAS_SOFTCAP STORES_SLOPE",
    "STORES HAS_SUMS HAS_BIAS HAS_SOFTCAP HAS_MOMENT",
]


@dataclass(frozen=True)
class Variant:
    """A kernel as one kind of launch compiles it."""

    kernel: Any
    dtype: str
    flags: tuple[str, ...]
    constants: dict[str, Any]
    options: dict[str, int]

    def __str__(self) -> str:
        return " ".join([self.kernel.fn.__name__, self.dtype, *self.flags])

    @property
    def is_product(self) -> bool:
        """Whether it is the fused product, which has a tile by target."""
        return self.kernel is PRODUCT

    @property
    def targets(self) -> list[str]:
        """What it compiles for."""
        return list(TILES if self.is_product else TARGETS)


def variant(kernel: Any, dtype: str, flags: str, blocks: Any, options: Any) -> Variant:
    """A launch with some of `FLAGS` set."""
    names, chosen = kernel.arg_names, tuple(flags.split())
    constants = {name: name in chosen for name in FLAGS if name in names}
    constants |= {name: size for name, size in blocks.items() if name in names}
    for flag, pointers in POINTERS.items():
        if flag in names and flag not in chosen:
            constants |= {pointer: None for pointer in pointers if pointer in names}
    return Variant(kernel, dtype, chosen, constants, {**options, "enable_fp_fusion": True})


def product_variant(flags: str) -> Variant:
    """A launch of the fused product; its tile is the target's."""
    return variant(PRODUCT, "bf16", flags, {}, {})


def for_target(launch: Variant, target: str) -> Variant:
    """Put in the tile of the target."""
    if not launch.is_product:
        return launch
    tile = TILES[target]
    rich = {"HAS_SOFTCAP", "HAS_MOMENT"} & set(launch.flags)
    blocks = exp_product.blocks(tile, rich=bool(rich)) | {"PROGRAMS": 132}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return Variant(
        launch.kernel,
        launch.dtype,
        launch.flags,
        launch.constants | blocks,
        options | launch.options,
    )


def variants() -> Iterator[Variant]:
    """Every kernel, as launches of this library compile it."""
    yield from map(product_variant, PRODUCTS)
    for kernel, blocks, options, launches in LAUNCHES:
        of_dtype = {"values_ptr", *OF_DTYPE} & set(kernel.arg_names)
        for flags in launches:
            for dtype in ("bf16", "fp32") if of_dtype and "NARROWS" not in flags else ("bf16",):
                yield variant(kernel, dtype, flags, blocks, options)


def launches_of(kernel: Any, flags: str | None = None) -> list[Variant]:
    """Those of a kernel, or those with these flags alone."""
    found = [launch for launch in variants() if launch.kernel is kernel]
    return [launch for launch in found if flags is None or launch.flags == tuple(flags.split())]


def argument_type(name: str, launch: Variant) -> str:
    """The type under which a launch passes an argument."""
    sizes = launch.constants
    boxes = {
        "x_desc": ("BLOCK_N", "BLOCK_H"),
        "w_desc": ("BLOCK_V", "BLOCK_H"),
        "e_desc": ("BLOCK_N", "BLOCK_V"),
    }
    if name in boxes:
        height, width = (sizes[side] for side in boxes[name])
        width //= sizes["PIECES"] if name == "e_desc" else 1
        return f"tensordesc<{launch.dtype}[{height}, {width}]>"
    if name in OF_DTYPE or (name == "values_ptr" and launch.kernel is rescale.rescale_kernel):
        return f"*{launch.dtype}"
    if name.endswith("_ptr"):
        return TYPES.get(name, "*fp32")
    return "fp32" if name in SCALARS else "i32"  # an int below 2^31 is passed in 32 bits


def source(launch: Variant) -> ASTSource:
    """What a launch compiles."""
    names, constants = launch.kernel.arg_names, launch.constants
    signature = {
        name: "constexpr" if name in constants else argument_type(name, launch) for name in names
    }
    at = {(names.index(name),): value for name, value in constants.items()}
    aligned = [name for name in names if name.endswith("_ptr") and name not in constants]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=at, attrs=attrs)


def compiled(launch: Variant, target: str) -> Any:
    """Compile for a target."""
    launch = for_target(launch, target)
    return triton.compile(source(launch), target=TARGETS[target], options=launch.options)


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
    """Vector registers of a thread, and the bytes that leave them; scalars spill to lanes."""
    (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", assembly)
    (spilled,) = re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    return int(registers), 4 * int(spilled)


def resources(launch: Variant, target: str) -> tuple[int, int]:
    """Compile; return the registers of a thread and the bytes it spills."""
    binary = compiled(launch, target).asm
    if TARGETS[target].backend == "hip":
        return hip_resources(binary["amdgcn"])
    return cuda_resources(binary["cubin"])


def table() -> dict[str, Any]:
    """[registers, spilled bytes] by kernel and target."""
    kernels = {
        str(launch): {target: list(resources(launch, target)) for target in launch.targets}
        for launch in variants()
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
