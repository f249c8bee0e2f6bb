"""A sampler of the library in place of TRL's generation: checked, synced, and asked."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model
from torch import Tensor, nn

from ...rollouts.records import Rollout
from ...rollouts.sampling import AnySampler, check_sampler, run_blocking
from ...rollouts.two_stage import stream_two_stage_rollout, two_stage_rollout
from .config import IGRPOConfig

logger = logging.getLogger(__name__)

OF_VLLM = (
    "vllm_mode",
    "vllm_model_impl",
    "vllm_enable_sleep_mode",
    "vllm_structured_outputs_regex",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_tensor_parallel_size",
)
OF_CORRECTION = (
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_cap",
)
OF_GENERATION = (
    "use_vllm",
    *OF_VLLM,
    "use_transformers_continuous_batching",
    "transformers_continuous_batching_config",
    "ds3_gather_for_generation",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "cache_implementation",
)
OF_ADAPTERS = (".lora_", ".original_module.", "trainable_tokens_", ".ref.")


def check_sampler_options(args: IGRPOConfig, sampler: AnySampler | None) -> None:
    """Refuse options that the sampler, or its absence, would leave without effect.

    Raises:
        TypeError: `sampler` is not a sampler.
        ValueError: An option has no effect, or differs from the sampler's own.
    """
    if not args.vllm_importance_sampling_correction and (idle := args.changed(*OF_CORRECTION)):
        raise ValueError(
            f"{', '.join(idle)} would have no effect with vllm_importance_sampling_correction=False"
        )
    if sampler is None:
        if idle := args.changed("reward_max", "sampler_concurrency"):
            raise ValueError(f"{', '.join(idle)} would have no effect without a sampler")
        if not args.use_vllm and (idle := args.changed(*OF_VLLM, *OF_CORRECTION)):
            raise ValueError(f"{', '.join(idle)} would have no effect with use_vllm=False")
        cuts = args.changed("top_p", "top_k", "min_p")
        if args.use_vllm and args.vllm_importance_sampling_correction and cuts:
            logger.warning(
                "%s cuts the distribution that vLLM draws from, and its log-probs are of the cut "
                "one: the importance correction takes the difference for a mismatch. Set "
                "vllm_importance_sampling_correction=False, or pass a sampler of the library",
                ", ".join(cuts),
            )
        return
    check_sampler(sampler)
    in_step = args.reward_max is None and not hasattr(sampler, "sample_one")
    if in_step and args.changed("sampler_concurrency"):
        raise ValueError("sampler_concurrency would have no effect: the sampler has no sample_one")
    if idle := args.changed(*OF_GENERATION):
        raise ValueError(f"{', '.join(idle)} would have no effect beside a sampler: it draws")
    owner = {"temperature": getattr(sampler, "distribution", None)}
    for of_sampler, of_args in (
        ("temperature", "temperature"),
        ("max_new_tokens", "max_completion_length"),
        ("chat_template_kwargs", "chat_template_kwargs"),
    ):
        own = getattr(owner.get(of_sampler, sampler), of_sampler, None)
        wanted = getattr(args, of_args)
        if own is not None and own != wanted and (own or wanted):
            raise ValueError(
                f"the sampler's {of_sampler} = {own} and args.{of_args} = {wanted} must be equal"
            )


def draw_rollouts(
    prompts: list[Any],
    sampler: AnySampler,
    reward: Any,
    *,
    concurrency: int,
    reward_max: float | None,
    **options: Any,
) -> list[Rollout]:
    """Draw both stages of some prompts, as a stream; in step if the sampler has only a batch form.

    Args:
        prompts: P prompts.
        sampler: What draws.
        reward: A reward that asks for the column `row`.
        concurrency: As in `stream_two_stage_rollout`.
        reward_max: As in `stream_two_stage_rollout`.
        **options: As in both forms.

    Returns:
        The rollouts, in the order of the prompts.
    """
    options["columns"] = {"row": list(range(len(prompts)))}
    if reward_max is None and not hasattr(sampler, "sample_one"):
        return list(two_stage_rollout(prompts, sampler, reward, **options))
    stream = stream_two_stage_rollout(
        prompts, sampler, reward, concurrency=concurrency, reward_max=reward_max, **options
    )

    async def collect() -> list[Rollout]:
        return [rollout async for rollout in stream]

    return sorted(run_blocking(collect()), key=lambda rollout: rollout.index)


def sync_sampler(sampler: Any, model: nn.Module, accelerator: Any, backend: Any) -> None:
    """Give the sampler the model's current weights.

    Every rank calls it. Engines are synced one after the other; servers that all ranks share
    (`is_shared`) by the main process alone. A sampler without `sync_weights`, and one that draws
    from the very model that is trained, are left alone.
    """
    unwrapped = accelerator.unwrap_model(model)
    sync = getattr(sampler, "sync_weights", None)
    if sync is None or getattr(sampler, "model", None) is unwrapped:
        return
    with whole_weights(unwrapped, backend) as weights:
        for rank in range(accelerator.num_processes):
            mine = rank == accelerator.process_index
            if mine and (rank == 0 or not getattr(sampler, "is_shared", False)):
                sync(weights)
            accelerator.wait_for_everyone()


@contextmanager
def whole_weights(model: Any, backend: Any) -> Iterator[dict[str, Tensor]]:
    """Lend a model's weights: gathered, adapters merged, under the names of the model's files.

    Args:
        model: The model that is trained, unwrapped.
        backend: TRL's `DistributedBackend`.
    """
    with (
        backend.gather_params(list(model.parameters())),
        backend.summon_full_params(model, writeback=False),
    ):
        if not is_peft_model(model):
            yield {name: _whole(value) for name, value in model.state_dict().items()}
            return
        model.merge_adapter()
        try:
            yield {
                _file_name(name): _whole(value)
                for name, value in model.get_base_model().state_dict().items()
                if not any(part in name for part in OF_ADAPTERS)
            }
        finally:
            model.unmerge_adapter()


def _file_name(name: str) -> str:
    for part in (".base_layer", ".modules_to_save.default", ".token_adapter"):
        name = name.replace(part, "")
    return name


def _whole(value: Any) -> Tensor:
    """Gather what FSDP2 has sharded."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole
