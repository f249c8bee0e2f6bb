"""Ray on a machine that has other things to do: it gives its processes 30 seconds to start."""

import os
import time
from typing import Any

import pytest
import ray
from ray._private import services

PATIENCE = 900.0  # seconds
os.environ.update(
    RAY_prestart_worker_first_driver="0",  # no worker that nobody asked for
    RAY_worker_register_timeout_seconds=str(int(PATIENCE)),
    RAY_health_check_failure_threshold="100",
)
get_node = services.get_node


def wait_for_node(*args: Any) -> Any:
    """Give Ray's own answer, or wait for it where Ray says that there is none yet."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return get_node(*args)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def start_ray(num_cpus: int, environment: dict[str, str]) -> None:
    """Start a cluster of one node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "get_node", wait_for_node)
        ray.init(num_cpus=num_cpus, runtime_env={"env_vars": environment}, include_dashboard=False)
