"""The recorded runs: one dated JSON each, written case by case. `compare` reads them back."""

import json
import os
import re
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.measure import Ceilings, Figure

RESULTS = Path(__file__).resolve().parent / "results"

Record = dict[str, Any]


def about(device: torch.device, *sources: str) -> Record:
    """Say when and on what a run is made, and from which commit of some sources."""
    return {
        "date": date.today().isoformat(),
        "commit": machine.commit(*sources),
        "hardware": machine.hardware(device),
        "versions": machine.versions(device),
    }


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


def default_path(record: Record) -> Path:
    """A dated name: 2026-11-24-2105-nvidia-h100.json."""
    name = re.sub(r"[^a-z0-9]+", "-", record["hardware"]["name"].lower()).strip("-")
    date = re.sub(r"[^0-9]+", "-", record["date"].replace(":", ""))
    return RESULTS / f"{date}-{name}.json"


def resumed(record: Record, path: Path) -> Record:
    """The record at `path`, to go on with; or the new one, where there is none.

    Raises:
        ValueError: It was made by other sources, or by some that are in no commit; on another
            machine; or with other versions.
    """
    if not path.exists():
        return record
    old: Record = json.loads(path.read_text())
    for name in ("commit", "device", "hardware", "versions"):
        if old.get(name) != record[name] or str(old.get(name)).endswith("+"):
            raise ValueError(
                f"{path} can't be continued: its {name} is {old.get(name)}, and here it is "
                f"{record[name]}; give another --output"
            )
    return old


def write(record: Record, path: Path) -> None:
    """Replace the file in one step: an interrupted run leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def add(record: Record, figures: list[Figure]) -> None:
    record["figures"] += [figure.record() for figure in figures]


def recorded(folder: Path = RESULTS) -> list[tuple[Path, Record]]:
    """All recorded runs of the kernels, oldest first; other benchmarks' files are left out."""
    found = ((path, json.loads(path.read_text())) for path in folder.glob("20*.json"))
    kernels = [(path, record) for path, record in found if record.get("ceilings")]
    return sorted(kernels, key=lambda run: run[1]["date"])
