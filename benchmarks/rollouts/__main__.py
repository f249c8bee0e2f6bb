"""Wall time and tokens of two-stage rollouts over GRPO's, simulated and on a real engine.

    python -m benchmarks.rollouts                          # simulation alone
    python -m benchmarks.rollouts --real-engine PYTHON     # PYTHON: an interpreter that has vLLM

The real engine's steps are timed first, and the simulation takes its costs from them; without it
they come from the latest record that has some. Writes benchmarks/results/rollouts-DATE.json and
the pictures beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from igrpo_algo.cli.metrics_file import write_json

from .engine import Costs
from .fit import as_line, compare, fit_costs
from .pictures import draw_bars, draw_timelines
from .simulation import Setting, over_seeds

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
VARIANTS = ("barrier", "stream, refinements first", "stream", "early selection")
GPU_LIKE = Costs((1, 256), (8e-3, 20e-3), 20e-3 / 256 / 4)
"""Not measured: a step of 8 ms that grows to 20 ms, prompt tokens at a quarter of a decoded one's
cost. What the fit to a CPU engine cannot show: steps whose time hardly depends on the batch."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="3 seeds, 2 repeats, fewer questions asked"
    )
    parser.add_argument(
        "--real-engine", metavar="PYTHON", nargs="?", const=sys.executable,
        help="time vLLM too, under this interpreter (this one)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, help="of the simulation (20; 3 where quick)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    seeds = arguments.seeds or (3 if arguments.quick else 20)
    record: dict[str, Any] = {"about": about(), "quick": arguments.quick, "seeds": seeds}
    if arguments.real_engine:
        record["real_engine"] = run_real_engine(arguments.real_engine, 2 if arguments.quick else 8)
    else:
        record["real_engine"] = latest_real_engine(arguments.out)
    costs = fit_costs(record["real_engine"])
    record["fitted_costs"] = asdict(costs)
    record["real_engine_beside_simulation"] = compare(record["real_engine"], costs)
    setting = Setting(as_line(costs))
    record["settings"] = asdict(setting)
    record["simulation"] = simulate_all(setting, seeds, quick=arguments.quick)
    name = f"rollouts-{record['about']['date'][:10]}"
    path = arguments.out / f"{name}.json"
    write_json(path, record)
    panels = {
        "Simulation, 256 slots, costs of the CPU engine": record["simulation"]["8 waves"],
        "Simulation, 256 slots, GPU-like costs (assumed)": record["simulation"]["GPU-like costs"],
        "vLLM on CPU, 16 slots, CPU time": {
            name: {"wall_over_grpo": row["over_grpo"]}
            for name, row in record["real_engine_beside_simulation"].items()
        },
    }
    draw_bars(panels, arguments.out / f"{name}.png")
    draw_timelines(replace(setting, costs=GPU_LIKE, slots=64), arguments.out)
    show(record)
    print(f"\nwritten to {path}")


def simulate_all(setting: Setting, seeds: int, *, quick: bool) -> dict[str, Any]:
    """Run every setting of the simulation, by its name."""
    early = ("early selection",)
    two = ("barrier", "stream", "early selection")
    asked: dict[str, tuple[Setting, tuple[str, ...]]] = {
        "8 waves": (setting, VARIANTS),
        "GPU-like costs": (replace(setting, costs=GPU_LIKE), VARIANTS),
        "success 0.2": (replace(setting, success=0.2), early),
        "success 0.8": (replace(setting, success=0.8), early),
        **{f"{n} waves": (replace(setting, waves=n), VARIANTS) for n in (2, 4, 16)},
        "cache of 1 wave": (replace(setting, cache_waves=1), two),
        "no prefix cache": (replace(setting, cache_waves=0), two),
        "longer tail (sigma 1)": (replace(setting, sigma=1.0), two),
        "half of the spread is the prompt's": (replace(setting, shared=0.5), two),
        "no queue in the engine": (replace(setting, queue=0), two),
        "groups hold their slots": (replace(setting, one_by_one=False), ("stream",)),
        "groups hold them, twice as many": (
            replace(setting, one_by_one=False, queue=setting.slots),
            ("stream",),
        ),
    }
    if quick:
        asked = {what: asked[what] for what in ("8 waves", "GPU-like costs")}
    results = {}
    # A fresh interpreter per worker: torch does not like to be forked.
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for number, (what, (its_setting, variants)) in enumerate(asked.items(), 1):
            began = time.monotonic()
            results[what] = over_seeds(its_setting, variants, seeds, pool)
            print(f"[{number}/{len(asked)}] {what}: {time.monotonic() - began:.0f} s", flush=True)
    return results


def run_real_engine(python: str, repeats: int) -> dict[str, Any]:
    """Time the real engine in its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "real.json")
        command = [python, "-m", "benchmarks.rollouts.real_engine", out, "--repeats", str(repeats)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        record: dict[str, Any] = json.loads(out.read_text())
    return record


def latest_real_engine(folder: Path) -> dict[str, Any]:
    """Read the real engine's timings from the latest record."""
    for path in sorted(folder.glob("rollouts-*.json"), reverse=True):
        record = json.loads(path.read_text())
        return {**record["real_engine"], "taken_from": path.name}
    raise SystemExit(f"no record in {folder}: run with --real-engine once, where vLLM is installed")


def about() -> dict[str, Any]:
    """Say when, where and on what the figures were taken."""
    cpu = torch.device("cpu")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": machine.commit("igrpo_algo", "benchmarks"),
        "hardware": machine.hardware(cpu),
        "load": os.getloadavg()[0],
        "versions": machine.versions(cpu),
    }


def show(record: dict[str, Any]) -> None:
    """Print the figures as a table."""
    print(f"\n{'simulation':61}{'wall over GRPO':^23}{'tokens':>8}{'cached':>8}")
    for what, variants in record["simulation"].items():
        for name, row in variants.items():
            print(
                f"{what:36}{name:26}{spread(row['wall_over_grpo'])}"
                f"{row['tokens_over_grpo']['mean']:8.3f}{row['stage_2_cached']['mean']:8.1%}"
            )
    print(f"\n{'vLLM on CPU, 16 slots':26}{'CPU time over GRPO':^23}{'simulated':>10}{'error':>8}")
    for name, row in record["real_engine_beside_simulation"].items():
        print(
            f"{name:26}{spread(row['over_grpo'])}{row['simulated_over_grpo']['mean']:10.3f}"
            f"{row['error_of_ratio']['mean']:+8.1%}   steps {row['steps_over_grpo']['mean']:.3f}, "
            f"simulated {row['simulated_steps_over_grpo']['mean']:.3f}   "
            f"cached {row.get('stage_2_cached', {'mean': 0.0})['mean']:.1%}"
        )


def spread(figure: dict[str, float]) -> str:
    """Write a mean and its interval."""
    return f"{figure['mean']:7.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


if __name__ == "__main__":
    main()
