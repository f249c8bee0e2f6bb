"""TRL's own options: their ranges, and what would leave them without effect."""

from typing import TYPE_CHECKING

from transformers import GenerationConfig

from igrpo_kernels.checks import check_number, describe

if TYPE_CHECKING:
    from .config import IGRPOConfig

RANGES: dict[str, dict[str, float]] = {
    "learning_rate": {"at_least": 0},
    "weight_decay": {"at_least": 0},
    "max_grad_norm": {"at_least": 0},
    "num_train_epochs": {"above": 0},
    "max_completion_length": {"at_least": 1},
    "temperature": {"above": 0},
    "top_p": {"above": 0, "at_most": 1},
    "min_p": {"at_least": 0, "at_most": 1},
    "repetition_penalty": {"above": 0},
    "beta": {"at_least": 0},
    "entropy_coef": {},
    "top_entropy_quantile": {"at_least": 0, "at_most": 1},
    "off_policy_mask_threshold": {},
    "vllm_importance_sampling_clip_max": {"above": 0},
    "vllm_importance_sampling_clip_min": {"at_least": 0},
}
UNREAD = {
    "label_smoothing_factor": "there are no labels",
    "label_names": "there are no labels",
    "train_sampling_strategy": "groups of a prompt stay together; see shuffle_dataset",
    "length_column_name": "groups of a prompt stay together; see shuffle_dataset",
    "batch_eval_metrics": "there is no compute_metrics",
    "log_multimodal": "images are refused",
    "max_tool_calling_iterations": "tools are refused",
}
"""Options that `GRPOTrainer` inherits, or that need what iGRPO refuses; and the reason."""
READ_WITH = {
    "sync_ref_model": ("ref_model_mixup_alpha", "ref_model_sync_steps"),
    "use_adaptive_entropy": (
        "entropy_coef_min",
        "entropy_coef_max",
        "entropy_coef_delta",
        "entropy_target",
    ),
    "log_completions": ("num_completions_to_print", "log_unique_prompts"),
    "use_transformers_continuous_batching": ("transformers_continuous_batching_config",),
}
"""Options that another one has to switch on."""


def check_trl_options(args: "IGRPOConfig") -> None:
    """Refuse values out of range, and options that TRL would ignore in silence.

    Raises:
        TypeError: An option is not a number.
        ValueError: The option, and why it is refused.
    """
    for name, bounds in RANGES.items():
        if getattr(args, name) is not None:
            check_number(name, getattr(args, name), **bounds)
    known = args.__dataclass_fields__
    for name in args.changed(*(name for name in UNREAD if name in known)):
        raise ValueError(f"{name} would have no effect: {UNREAD[name]}")
    for switch, names in READ_WITH.items():
        if not getattr(args, switch) and (idle := args.changed(*names)):
            raise ValueError(f"{', '.join(idle)} would have no effect with {switch}=False")
    if args.data_seed not in (None, args.seed):
        raise ValueError("data_seed would have no effect: seed gives the order of prompts too")
    if args.loss_type == "dr_grpo" and args.max_completion_length is None:
        raise ValueError("loss_type='dr_grpo' divides by max_completion_length, got None")
    if args.accelerator_config.dispatch_batches:
        raise ValueError("accelerator_config must leave dispatch_batches off: prompts are text")
    _check_generation(args)


def _check_generation(args: "IGRPOConfig") -> None:
    given = args.generation_kwargs or {}
    if not isinstance(given, dict):
        raise TypeError(f"generation_kwargs must be a dict, got {describe(given)}")
    if given.get("temperature", args.temperature) != args.temperature:
        raise ValueError(
            f"generation_kwargs has temperature = {given['temperature']} where the loss takes "
            f"args.temperature = {args.temperature}: set that one"
        )
    for name in ("num_return_sequences", "n"):
        if given.get(name, 1) != 1:
            raise ValueError(f"generation_kwargs must not have {name}: num_refinements says it")
    known = GenerationConfig()
    unknown = [name for name in given if not hasattr(known, name)]
    if unknown and not args.use_vllm:
        raise ValueError(
            f"generation_kwargs would have no effect with {', '.join(unknown)}, which "
            "transformers' GenerationConfig does not have"
        )
