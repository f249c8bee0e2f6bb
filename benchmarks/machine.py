"""What a figure was taken on: hardware, versions, commit."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "quack-kernels",
    "nvidia-cutlass-dsl",
)


def output_of(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def hardware(device: torch.device) -> dict[str, Any]:
    """What has to be equal for two runs to be compared."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30),
        }
    cores = len(os.sched_getaffinity(0))
    return {"name": processor(), "cores": cores, "threads": torch.get_num_threads()}


def versions(device: torch.device) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    if device.type == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["driver"] = (output_of(*query) or "").partition("\n")[0] or None
    return found


def commit(*sources: str) -> str | None:
    """The commit of the sources, with a + where they differ from it; None outside a clone."""
    head = output_of("git", "rev-parse", "--short=10", "HEAD")
    sources = sources or ("igrpo_kernels",)
    changes = output_of("git", "status", "--porcelain", "--untracked-files=no", "--", *sources)
    return head and head + ("+" if changes else "")
