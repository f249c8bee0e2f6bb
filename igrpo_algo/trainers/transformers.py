"""A training loop of your own over a transformers model: Stage 2 with its prompts shared."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..shared_prompt.attention import attend_shared_prompt
from ..shared_prompt.packing import SharedPromptRow

SHARED_PROMPT = "igrpo_shared_prompt"
"""Name of the attention implementation; without a `shared_prompt` it is transformers' "sdpa"."""

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices", "cache")


def enable_shared_prompt(model: PreTrainedModel) -> None:
    """Let a model run rows of `pack_shared_prompt`, beside all that it ran before.

    Sets the model's attention to one that is transformers' "sdpa" for every other input, so leave
    it on: a gradient checkpoint runs the layers again during the backward. The log-probs and
    gradients of a row are those of its completions run as sequences of their own (where rotary
    scaling is dynamic, as one batch: the longest decides). On CUDA the rows attend through
    FlexAttention, compiled for each of a few row sizes when the first row of that size comes; its
    speed is not yet measured.

    Args:
        model: A causal language model whose layers all attend through transformers' attention
            interface, with full or sliding-window attention.

    Raises:
        ValueError: The model has other layers (recurrent ones, say), makes masks of its own, or
            caps its attention logits. Sinks, biases and indexers raise in the forward.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from igrpo_algo.shared_prompt.packing import pack_shared_prompt
        >>> config = LlamaConfig(
        ...     vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...     num_attention_heads=2, pad_token_id=0,
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> enable_shared_prompt(model)
        >>> (row,) = pack_shared_prompt([[5, 6]], [[[7, 8], [9]]])
        >>> shared_prompt_hidden(model, row).shape
        torch.Size([1, 5, 8])
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"model must have {' and '.join(sorted(ATTENTION_LAYERS))} layers alone, "
            f"got {name} with {', '.join(sorted(others)) or 'a recurrent state'}"
        )
    if not model._supports_flash_attn or not getattr(config, "is_causal", True):
        raise ValueError(f"model must be causal and free of masks of its own, got {name}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(
            f"model must not cap its attention logits, "
            f"got {name} with attn_logit_softcapping={config.attn_logit_softcapping}"
        )
    AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)
    AttentionMaskInterface.register(SHARED_PROMPT, sdpa_mask)
    model.set_attn_implementation(SHARED_PROMPT)
    if config._attn_implementation != SHARED_PROMPT:
        raise ValueError(f"model must attend through transformers' AttentionInterface, got {name}")


def shared_prompt_hidden(model: PreTrainedModel, row: SharedPromptRow) -> Tensor:
    """Run a row through the decoder, up to what the head takes.

    The loss of a micro-batch of `TrainingBatch.shared_prompt` is then

    hidden = shared_prompt_hidden(model, micro.layout)
    linear_policy_loss(**micro.loss_inputs(hidden), weight=model.lm_head.weight, ...)

    A wrapped model (DDP, FSDP) must be called through its wrapper: pass it `row.model_inputs()`,
    and `logits_to_keep=row.predictors` for the logits of the L targets alone.

    Args:
        model: What `enable_shared_prompt` was given.
        row: One of the rows of `pack_shared_prompt`, on any device.

    Returns:
        Last hidden states. Shape [1, S, H].

    Raises:
        ValueError: `model` attends in another way.
    """
    actual = model.config.get_text_config()._attn_implementation
    if actual != SHARED_PROMPT:
        raise ValueError(f"model must have been given to enable_shared_prompt, got {actual!r}")
    inputs = row.to(model.device).model_inputs()
    return model.get_decoder()(**inputs).last_hidden_state


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prompt: SharedPromptRow | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention interface asks; see `attend_shared_prompt`."""
    if shared_prompt is None:
        options |= {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, **options
        )
    used = [name for name in UNSUPPORTED if options.get(name) is not None]
    if used:
        raise ValueError(f"a shared prompt cannot be attended to with {', '.join(used)}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"a shared prompt needs causal attention, {type(module).__name__} is not")
    if attention_mask is not None and attention_mask.numel() > 0:
        raise ValueError(
            f"attention_mask must be that of SharedPromptRow.model_inputs(), "
            f"got shape {list(attention_mask.shape)}"
        )
    size = sum(map(sum, shared_prompt.lengths))
    if (query.shape[0], query.shape[2], key.shape[2]) != (1, size, size):
        raise ValueError(
            f"a row of {size} tokens must run by itself and without a cache, got queries of shape "
            f"{list(query.shape)} and keys of shape {list(key.shape)}"
        )
    attended = attend_shared_prompt(
        query,
        key,
        value,
        shared_prompt.lengths,
        scale=scaling,
        window=sliding_window,
        dropout=dropout,
    )
    return attended.contiguous(), None
