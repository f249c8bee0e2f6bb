"""Registers and spilled bytes of every Triton kernel, as the compilers report them without a GPU.

    python -m benchmarks.triton_resources

writes benchmarks/results/triton_resources.json, which a test compares with what compiles: every
kernel and target must be there, and none may spill but one, where rows out of range alone feel it.
Exact registers are the compiler's business.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
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
OF_DTYPE = {
    "x_ptr",
    "w_ptr",
    "bias_ptr",
    "e_ptr",
    "scaled_ptr",
    "out_ptr",
    "logits_ptr",
    "grad_ptr",
    "values_ptr",
}
TYPES = {"targets_ptr": "*i64", "rows_ptr": "*i64", "mask_ptr": "*i1"}
SCALARS = ("scale", "softcap", "low", "high", "dual", "kl_coef")

PRODUCT = exp_product.exp_product_kernel
TOTALS = exp_rows.row_totals_kernel
EXP_ROWS = exp_rows.exp_rows_kernel
FORWARD, BACKWARD = logit_rows.logit_rows_fwd_kernel, logit_rows.logit_rows_bwd_kernel
ROW_BLOCKS = {"BLOCK_V": exp_rows.BLOCK_V, "BLOCK_H": exp_rows.BLOCK_H}
WIDE = {"num_warps": 8}
# The kernels, their block sizes and options, and some launches of each: which of the arguments that
# may be None are given, and which flags are set. Each of either stands in one launch at least; so
# does w_step, which is 1, and then a constant, unless the weight is stored transposed.
LAUNCHES: list[tuple[Any, dict[str, int], dict[str, int], list[str]]] = [
    (exp_rows.target_logits_kernel, ROW_BLOCKS, {}, ["", "bias_ptr softcap w_step"]),
    (
        EXP_ROWS,
        ROW_BLOCKS,
        WIDE,
        ["", "e_ptr NARROWS", "e_ptr bias_ptr softcap moments_ptr STORES_SLOPE"],
    ),
    (
        TOTALS,
        {name: size for name, size in exp_rows.TOTALS.items() if name.startswith("BLOCK")},
        {name: size for name, size in exp_rows.TOTALS.items() if name.startswith("num")},
        ["", "e_ptr w_step", "e_ptr STORES_SLOPE bias_ptr softcap moments_ptr entropy_ptr"],
    ),
    (
        head_rows.weigh_rows_kernel,
        ROW_BLOCKS,
        WIDE,
        ["softcap by_logprob_ptr", "by_entropy_ptr entropy_ptr by_logprob_ptr"],
    ),
    (
        head_rows.gradient_rows_kernel,
        ROW_BLOCKS,
        {},
        ["by_logprob_ptr", "by_logprob_ptr scaled_ptr softcap", ""],
    ),
    (
        head_rows.clip_rows_kernel,
        ROW_BLOCKS,
        {},
        [
            "",
            "old_ptr e_ptr factors_ptr scaled_ptr",
            "rows_ptr old_ptr ref_ptr importance_ptr entropy_ptr e_ptr factors_ptr softcap",
        ],
    ),
    (head_rows.scale_rows_kernel, ROW_BLOCKS, {}, ["", "rows_ptr"]),
    (rescale.rescale_kernel, {"BLOCK": rescale.BLOCK}, WIDE, [""]),
    (
        clip_terms.clip_tokens_kernel,
        {"BLOCK": clip_terms.BLOCK},
        WIDE,
        [
            "old_ptr losses_ptr slopes_ptr",
            "mask_ptr old_ptr ref_ptr importance_ptr weights_ptr slopes_ptr sums_ptr",
            "old_ptr entropy_ptr weights_ptr sums_ptr WIDE",
        ],
    ),
    (FORWARD, {"BLOCK_V": logit_rows.BLOCK_V}, WIDE, ["", "mask_ptr entropy_ptr"]),
    (
        BACKWARD,
        {"BLOCK_V": logit_rows.BLOCK_V},
        WIDE,
        ["by_logprob_ptr", "mask_ptr by_logprob_ptr by_entropy_ptr entropy_ptr"],
    ),
]
PRODUCTS = [
    "e_desc sums_ptr",
    "sums_ptr",
    "e_desc",
    "e_desc sums_ptr bias_ptr",
    "sums_ptr moments_ptr",
    "e_desc sums_ptr softcap STORES_SLOPE",
    "e_desc sums_ptr bias_ptr softcap moments_ptr",
]


@dataclass(frozen=True)
class Variant:
    """A kernel as one kind of launch compiles it."""

    kernel: Any
    dtype: str
    chosen: tuple[str, ...]
    constants: dict[str, Any]
    options: dict[str, int]
    aligned: bool = False

    def __str__(self) -> str:
        words = [self.kernel.fn.__name__, self.dtype, *self.chosen, *["aligned"] * self.aligned]
        return " ".join(words)

    @property
    def is_product(self) -> bool:
        """Whether it is the fused product, which has a tile by target."""
        return self.kernel is PRODUCT

    @property
    def targets(self) -> list[str]:
        """What it compiles for."""
        return list(TILES if self.is_product else TARGETS)


def variants_of(kernel: Any, blocks: Any, options: Any, launches: list[str]) -> Iterator[Variant]:
    """The launches of a kernel, with sizes that 16 divides and with others.

    Triton compiles the former by themselves, but for arguments that a kernel excepts.
    """
    names = kernel.arg_names
    optional = {word for launch in launches for word in launch.split()}
    for launch in launches:
        chosen = tuple(launch.split())
        # flags, which are in capitals, are set or not; other arguments that are not given are None
        constants: dict[str, Any] = {name: name in chosen for name in optional if name.isupper()}
        others = optional - constants.keys() - set(chosen)
        constants |= {name: 1 if name == "w_step" else None for name in others}
        constants |= {name: size for name, size in blocks.items() if name in names}
        in_both = OF_DTYPE & set(names) and not (kernel is PRODUCT or "NARROWS" in chosen)
        options = {**options, "enable_fp_fusion": True}
        for dtype, aligned in product(("bf16", "fp32") if in_both else ("bf16",), (False, True)):
            yield Variant(kernel, dtype, chosen, constants, options, aligned)


def for_target(launch: Variant, target: str) -> Variant:
    """Put in the tile of the target."""
    if not launch.is_product:
        return launch
    tile = TILES[target]
    rich = {"softcap", "moments_ptr"} & set(launch.chosen)
    blocks = exp_product.blocks(tile, rich=bool(rich)) | {"PROGRAMS": 132}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return replace(launch, constants=launch.constants | blocks, options=options | launch.options)


def variants() -> Iterator[Variant]:
    """Every kernel, as launches of this library compile it."""
    yield from variants_of(PRODUCT, {}, {}, PRODUCTS)  # whose tile is the target's
    for launches in LAUNCHES:
        yield from variants_of(*launches)


def launches_of(kernel: Any, chosen: str | None = None) -> list[Variant]:
    """Those of a kernel, or those of them with these arguments and flags alone."""
    found = [launch for launch in variants() if launch.kernel is kernel]
    return [some for some in found if chosen is None or some.chosen == tuple(chosen.split())]


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
    if name in OF_DTYPE:
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
    of_16 = {name for name in names if name.endswith("_ptr") and name not in constants}
    if launch.aligned:
        sizes = {name for name, kind in signature.items() if kind == "i32"}
        of_16 |= sizes - set(launch.kernel.do_not_specialize or ())
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in of_16}
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


def main() -> None:
    """Write the table and print it."""
    found = table()
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")
    kernels = found["registers and spilled bytes"]
    for name, targets in kernels.items():
        cells = [
            f"{target} {regs} registers, {spilled} B" for target, (regs, spilled) in targets.items()
        ]
        print(f"{name:80} {'   '.join(cells)}")


if __name__ == "__main__":
    main()
