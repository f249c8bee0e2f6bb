"""The samplers of the commands: a model for `igrpo eval`, and `--sampler` of `igrpo train`."""

from typing import TYPE_CHECKING, Any

from ..rollouts.sampling import AnySampler

if TYPE_CHECKING:
    from ..engines.transformers import TransformersSampler
    from ..trainers.trl.config import IGRPOConfig

CHOICES = "static, transformers, vllm, or the addresses of vLLM servers, separated by commas"


def check_sampler_name(name: str | None) -> None:
    """Raise ValueError if a name is neither one of the words nor made of addresses."""
    if name is None or name in ("static", "transformers", "vllm"):
        return
    if not all(url.startswith(("http://", "https://")) for url in name.split(",")):
        raise ValueError(f"--sampler must be {CHOICES} (http://...), got {name!r}")


def make_sampler(
    name: str | None, model: str, tokenizer: Any, config: "IGRPOConfig"
) -> AnySampler | None:
    """Make the sampler that draws both stages; None leaves them to TRL's own generation.

    Args:
        name: "static" or "transformers" (a copy of the model beside the trained one, decoded over
            static caches or by `generate`), "vllm" (an engine in this process), or the servers'
            addresses.
        model: A folder, or a name on the hub.
        tokenizer: The model's tokenizer.
        config: Gives the temperature, the length and what the chat template is given.
    """
    if name is None:
        return None
    options: dict[str, Any] = {
        "max_new_tokens": config.max_completion_length,
        "temperature": config.temperature,
        "chat_template_kwargs": config.chat_template_kwargs,
    }
    if name in ("static", "transformers"):
        from transformers import AutoModelForCausalLM

        from ..engines.static import StaticSampler
        from ..engines.transformers import TransformersSampler

        copy = AutoModelForCausalLM.from_pretrained(
            model, dtype="float32", trust_remote_code=config.trust_remote_code
        )
        kind = StaticSampler if name == "static" else TransformersSampler
        return kind(copy.to(config.device), tokenizer, **options)
    from ..engines.vllm import VllmSampler, VllmServerSampler

    if name == "vllm":
        return VllmSampler(model, tokenizer=tokenizer, **options)
    return VllmServerSampler(name.split(","), tokenizer, **options)


def load_sampler(
    model: str, tokenizer: Any, *, trust_remote_code: bool, **options: Any
) -> "TransformersSampler":
    """Load a model onto the accelerator, if there is one, and make a sampler of it."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..engines.transformers import TransformersSampler

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", trust_remote_code=trust_remote_code
    )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return TransformersSampler(loaded.to(device or "cpu"), tokenizer, **options)
