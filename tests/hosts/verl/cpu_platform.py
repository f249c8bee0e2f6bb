"""A CPU as one of verl's platforms (`VERL_PLATFORM=cpu`), so that its FSDP2 engine runs on it."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

KINDS = ("allocated", "reserved")


def _nothing(self: Any, *args: Any) -> None:
    return None


@PlatformRegistry.register(platform="cpu")
class CPU(PlatformBase):
    device_name = vendor_name = "cpu"
    device_module = SimpleNamespace(
        **{f"{which}memory_{kind}": lambda *_: 0 for which in ("", "max_") for kind in KINDS},
        mem_get_info=lambda *_: (0, 0),
        **{name: lambda *_: None for name in ("empty_cache", "synchronize", "set_device")},
        is_available=lambda: True,
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
    )
    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CPU_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str) -> Any:
        return nullcontext()

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False
