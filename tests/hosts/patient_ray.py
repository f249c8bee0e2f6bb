"""Ray on a machine that has other things to do: it gives its processes few seconds to start."""

import os

import ray

os.environ.update(
    RAY_prestart_worker_first_driver="0",  # no worker that nobody asked for
    RAY_agent_register_timeout_ms="600000",
    RAY_worker_register_timeout_seconds="600",
    RAY_health_check_failure_threshold="100",
)


def start_ray(num_cpus: int, environment: dict[str, str], tries: int = 10) -> None:
    """Start a cluster of one node; a node that is not there after 30 seconds is started anew."""
    for left in reversed(range(tries)):
        try:
            ray.init(
                num_cpus=num_cpus, runtime_env={"env_vars": environment}, include_dashboard=False
            )
        except Exception as error:
            ray.shutdown()
            if not left or "timed out during startup" not in str(error):
                raise
        else:
            return
