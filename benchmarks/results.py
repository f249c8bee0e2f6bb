"""The recorded runs: one dated JSON each, written case by case, and read back to compare."""

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.measure import Ceilings, Figure

RESULTS = Path(__file__).resolve().parent / "results"
IDENTITY = ("op", "passes", "dtype", "tokens", "vocabulary", "width", "active", "peer")

Record = dict[str, Any]


def new_record(
    device: torch.device, ceilings: Ceilings | None, commit: str | None = None
) -> Record:
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": commit or machine.commit(),
        "device": device.type,
        "hardware": machine.hardware(device),
        "versions": machine.versions(device),
        "ceilings": None if ceilings is None else vars(ceilings),
        "finished": False,
        "left_out": [],
        "figures": [],
    }


def default_path(record: Record, folder: Path = RESULTS) -> Path:
    """A dated name: 2026-11-24-2105-nvidia-h100.json."""
    name = re.sub(r"[^a-z0-9]+", "-", record["hardware"]["name"].lower()).strip("-")
    date = re.sub(r"[^0-9]+", "-", record["date"].replace(":", ""))
    return folder / f"{date}-{name}.json"


def write(record: Record, path: Path) -> None:
    """Replace the file in one step: an interrupted run leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def add(record: Record, figures: list[Figure]) -> None:
    record["figures"] += [figure.record() for figure in figures]


def recorded(folder: Path = RESULTS) -> list[tuple[Path, Record]]:
    """All recorded runs of the kernels, oldest first; other benchmarks' lie beside them."""
    found = ((path, json.loads(path.read_text())) for path in sorted(folder.glob("20*.json")))
    return [(path, record) for path, record in found if "ceilings" in record]


def last_before(record: Record, path: Path, folder: Path = RESULTS) -> tuple[Path, Record] | None:
    """The newest other run on the same hardware."""
    others = [
        (other, old)
        for other, old in recorded(folder)
        if other.name < path.name and old["hardware"] == record["hardware"]
    ]
    return others[-1] if others else None


def identity(figure: Record) -> tuple[Any, ...]:
    return tuple(figure[name] for name in IDENTITY)


def fallen(record: Record, old: Record) -> list[str]:
    """Where a figure is slower than it was, or larger, by more than the spread of both runs."""
    before = {identity(figure): figure for figure in old["figures"]}
    lines = []
    for figure in record["figures"]:
        past = before.get(identity(figure))
        if past is None:
            continue
        name = f"{figure['peer']}: " + " ".join(str(part) for part in identity(figure)[:-1])
        if figure["not_run"] and not past["not_run"]:
            lines.append(f"{name}: ran then, now not: {figure['not_run']}")
        elif figure["ms"] and past["ms"]:
            now, then = figure["ms"], past["ms"]
            spread = max(now["p80"] - now["p20"], then["p80"] - then["p20"])
            if now["median"] - then["median"] > spread:
                lines.append(f"{name}: {then['median']:.3g} -> {now['median']:.3g} ms")
            peaks = figure["peak_bytes"], past["peak_bytes"]
            if None not in peaks and peaks[0] > 1.05 * peaks[1] + 2**20:
                lines.append(f"{name}: {peaks[1] / 2**20:.0f} -> {peaks[0] / 2**20:.0f} MiB")
    return lines
