"""Lets CPUs pass for GPUs, on which alone accelerate shards weights.

As a file to launch it is the `igrpo` command on such CPUs:

    accelerate launch --config_file fsdp2.yaml --num_processes 2 cpus_for_gpus.py train ...
"""

import os
import warnings
from typing import Any

import torch
from accelerate import DistributedType, PartialState


def pass_for_gpus() -> None:
    """To be called before anything asks accelerate for its state."""
    shards = [os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED")]
    kind = DistributedType.MULTI_GPU if any(shards) else DistributedType.MULTI_CPU
    PartialState._prepare_backend = lambda *_, **__: ("gloo", kind)
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if shards[1]:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo, nothing to compile
        gather = deepspeed.comm.all_gather_into_tensor

        def gather_at_once(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            """ZeRO-3 waits for the last of many, which NCCL ends in order, and gloo does not."""
            handle = gather(*args, async_op=async_op, **kwargs)
            if async_op:
                handle.wait()
            return handle

        deepspeed.comm.all_gather_into_tensor = gather_at_once


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    pass_for_gpus()
    from igrpo_algo.cli.app import app

    app(standalone_mode=False)
    state = PartialState()
    print(f"rank {state.process_index} of {state.num_processes} is done", flush=True)
    torch.distributed.barrier()
    os._exit(0)  # a thread of torch's that is still there when Python ends aborts the process
