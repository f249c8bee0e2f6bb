"""`igrpo doctor`: what this machine can do, which path each op takes, what to install."""

import importlib.util
import json
import os
import platform
from importlib import metadata
from typing import Annotated, Any

import torch
import typer

from ..trainers.head_speed import head_speed
from .extras import pip_line

PACKAGES = {
    "triton": "triton",
    "transformers": "transformers",
    "trl": "trl",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "math_verify": "math-verify",
    "peft": "peft",
    "vllm": "vllm",
    "matplotlib": "matplotlib",
}
"""Modules, and the names to install them by."""

TRAINING = ("transformers", "trl", "accelerate", "datasets", "math_verify")
NEEDS = {
    "igrpo train": TRAINING,
    "igrpo train --peft-r": (*TRAINING, "peft"),
    "igrpo train --set use_vllm=true": (*TRAINING, "vllm"),
    "igrpo eval": ("transformers", "datasets", "math_verify"),
    "igrpo demo": (*TRAINING, "matplotlib"),
}
OPS = ("token_logprobs", "linear_token_logprobs", "clipped_policy_loss", "linear_policy_loss")


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine can do, which path each op takes, and what to install."""
    findings = examine()
    if as_json:
        print(json.dumps(findings, indent=2))
    else:
        print_findings(findings)


def examine() -> dict[str, Any]:
    """Collect the findings without importing the packages."""
    versions = {module: _version(module, name) for module, name in PACKAGES.items()}
    return {
        "igrpo": _version("igrpo_algo", "igrpo"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": {"cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "memory_gib": _memory(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "packages": versions,
        "ops": dict.fromkeys(OPS, _path(has_triton=versions["triton"] is not None)),
        "trainer_head": {name: head_speed(torch.device(name)) for name in _device_names()},
        "commands": {command: _readiness(modules) for command, modules in NEEDS.items()},
    }


def _version(module: str, distribution: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return None


def _device_names() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _path(*, has_triton: bool) -> str:
    """Name the path of a tensor on this machine's device; every op chooses by the device alone."""
    if not torch.cuda.is_available():
        return "torch on the CPU: no CUDA or ROCm device"
    if not has_triton:
        return "fails on the device: triton is not installed; torch on the CPU"
    return "Triton kernels on the device, torch on the CPU"


def _readiness(modules: tuple[str, ...]) -> dict[str, Any]:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    install = dict.fromkeys(filter(None, map(pip_line, missing)))
    return {"ready": not missing, "missing": missing, "install": list(install)}


def print_findings(findings: dict[str, Any]) -> None:
    """Print the findings for a person to read."""
    cpu, build = findings["cpu"], findings["cuda"] or findings["rocm"]
    print(f"igrpo {findings['igrpo']}, Python {findings['python']}, {findings['platform']}")
    print(
        f"{cpu['cores']} cores ({cpu['torch_threads']} threads in torch), "
        f"{findings['memory_gib']} GiB of memory"
    )
    print(f"torch {findings['torch']}, built for {f'CUDA/ROCm {build}' if build else 'CPUs'}")
    for number, device in enumerate(findings["devices"]):
        print(
            f"device {number}: {device['name']}, capability {device['capability']}, "
            f"{device['memory_gib']} GiB"
        )
    print("\npackages")
    for name, version in findings["packages"].items():
        print(f"  {name:24}{version or '-'}")
    print("\nops")
    for op, path in findings["ops"].items():
        print(f"  {op:24}{path}")
    print("\nloss and log-probs of IGRPOTrainer over TRL's (use_trl_loss=True)")
    for name, speed in findings["trainer_head"].items():
        print(f"  {name:24}{speed}")
    print("\ncommands")
    for command, state in findings["commands"].items():
        lines = " and ".join(state["install"])
        lack = f"missing {', '.join(state['missing'])}: {lines}"
        print(f"  {command:34}{'ready' if state['ready'] else lack}")
