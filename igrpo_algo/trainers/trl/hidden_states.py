"""A function of the last hidden states, run inside the model's own forward.

Wrappers (DDP, FSDP, DeepSpeed, PEFT, autocast) hook the forward of the model they wrap, and some
hold its weights whole only while that runs. So what is to replace the logits is handed into it.
"""

import functools
import inspect
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import maybe_gather_lm_head_ctx


class HeadInput(NamedTuple):
    """What a head turns into log-probs: logits = cap(logit_scale * (hidden @ weight.T + bias)).

    Attributes:
        hidden: Last hidden states. Shape [B, S, H].
        weight: The head's weight, whole also where it is sharded, in the dtype of `hidden`. [V, H].
        bias: The head's bias, likewise. Shape [V], or None.
        softcap: Bound on the logits, or None.
        logit_scale: Factor on the products.
        aux_loss: Load-balancing loss of a mixture of experts; None if it was not asked for.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    aux_loss: Tensor | None

    def options(self) -> dict[str, Any]:
        """Name what the ops of `igrpo_kernels` take besides hidden states and weight."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


Head = Callable[[HeadInput], dict[str, Tensor | None]]


def add_head_argument(model: PreTrainedModel, *, in_float32: bool = False) -> None:
    """Let `model(..., head=function)` return what the function makes of the hidden states.

    Without `head` the forward is the one it was. With it, the decoder is run without logits, and
    with the positions that the attention mask implies: models with learned positions would else
    count the padding on the left as part of the prompt (trl#6800). Only this instance changes.

    Args:
        model: A causal language model, not yet wrapped.
        in_float32: Run the head in float32, outside autocast.
    """
    original = model.forward
    takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self: PreTrainedModel, *args: Any, head: Head | None = None, **kwargs: Any) -> Any:
        if head is None:
            return original(*args, **kwargs)
        if takes_positions and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = _positions(**kwargs)
        kwargs |= {"use_cache": False}
        kwargs.pop("labels", None)  # PEFT adds it, and decoders do not take it
        # Looked up on each call: FSDP and PEFT replace decoder and head after this patch.
        out = self.base_model(*args, **kwargs)
        aux_loss = None
        if kwargs.get("output_router_logits"):
            aux_loss = _load_balancing_loss(self, out.router_logits, kwargs["attention_mask"])
        return _apply(head, self, out.last_hidden_state, aux_loss, in_float32=in_float32)

    model.forward = types.MethodType(forward, model)


def _apply(
    head: Head,
    model: PreTrainedModel,
    hidden: Tensor,
    aux_loss: Tensor | None,
    *,
    in_float32: bool,
) -> dict[str, Tensor | None]:
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    weight, bias = _whole(layer)
    hidden = hidden.to(weight.device)
    softcap = getattr(config, "final_logit_softcapping", None)
    precision: AbstractContextManager[Any] = nullcontext()
    if in_float32:
        precision, hidden = torch.autocast(hidden.device.type, enabled=False), hidden.float()
    with precision, maybe_gather_lm_head_ctx(weight, bias):
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        out = head(HeadInput(hidden, weight, bias, softcap, _logit_scale(config), aux_loss))
    if hasattr(layer, "reshard") and not torch.is_grad_enabled():
        layer.reshard()
    return out


def _positions(
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """Count the tokens that the mask lets through. Shape [B, S], or None without a mask."""
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    if attention_mask is None or tokens is None:
        return None
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return positions[:, -tokens.shape[1] :]  # a prefix of PEFT's stands in the mask alone


def _whole(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Return the head's weight and bias, gathered where FSDP2 keeps the head as a unit of its own.

    FSDP2 gathers a unit when its forward is called, which is not; asked to, it does as well, and
    averages the gradient over ranks like any other. `full_tensor()` would not: each rank would
    keep the part of its own gradient that belongs to its shard.
    """
    if hasattr(layer, "unshard"):
        layer.unshard()
    # PEFT's wrapper of a layer with trainable tokens has no attribute `bias`.
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if hasattr(weight, "full_tensor"):
        if torch.is_grad_enabled() and weight.requires_grad:
            raise ValueError(
                "the head's weight is sharded with another module (a tied embedding wrapped by "
                "itself): leave it to the root unit, as accelerate's TRANSFORMER_BASED_WRAP does"
            )
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    return weight, bias


def _logit_scale(config: Any) -> float:
    """Read the factor on the logits, which models keep under many names."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1 / float(scaling)


def _load_balancing_loss(model: PreTrainedModel, router_logits: Any, mask: Tensor) -> Any:
    # Every mixture of experts in transformers takes over Mixtral's.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    return load_balancing_loss_func(
        router_logits, config.num_experts, config.num_experts_per_tok, mask
    )
