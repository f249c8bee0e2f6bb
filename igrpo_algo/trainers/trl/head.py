"""Our log-prob op in TRL's fused head: the forward stays TRL's, the op inside it is ours."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl.trainer import utils as trl_utils

from igrpo_kernels import linear_token_logprobs

from ..head_speed import faster_head

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def igrpo_head() -> Iterator[None]:
    """Let forwards that `add_fused_lm_head` has patched score tokens with `linear_token_logprobs`.

    Where the forward calls TRL's op it calls ours while this context is open; nothing else of the
    forward changes, so wrappers (DDP, FSDP, PEFT, autocast) and the loss of experts' routers stay
    as they are. Positions without a label are left out on every device; TRL scores them off Triton.
    The exchange is one for the process: no other thread should run such a forward meanwhile.

    Yields:
        Nothing.
    """
    kept = trl_utils._ChunkedLogProbFunction, trl_utils._use_triton
    trl_utils._ChunkedLogProbFunction = _LogProbs
    trl_utils._use_triton = lambda device: True  # TRL's name for "leave unlabeled positions out"
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction, trl_utils._use_triton = kept


def choose_head(
    choice: str, head: nn.Module, device: torch.device
) -> Callable[[], AbstractContextManager[None]]:
    """Choose whose op scores tokens.

    "auto" takes ours where a recorded run has it faster than TRL's (`head_speed.faster_head`). TRL
    scores all positions on a CPU, ours those with a label, and in the backward ours skips tokens
    whose gradient is zero: groups of equal rewards cost it a forward alone.

    Args:
        choice: "auto", "igrpo" or "trl".
        head: The model's output layer.
        device: Where it runs.

    Returns:
        `igrpo_head`, or `nullcontext` for TRL's.

    Raises:
        ValueError: "igrpo", and ours can't serve this head.
    """
    if choice == "trl" or (choice == "auto" and faster_head(device).choice == "trl"):
        return nullcontext
    obstacle = _obstacle(head)
    if obstacle is None:
        return igrpo_head
    if choice == "igrpo":
        raise ValueError(f"fused_head='igrpo' can't serve here: {obstacle}")
    return nullcontext


def _obstacle(head: nn.Module) -> str | None:
    dtype = head.weight.dtype
    if dtype not in DTYPES:
        return f"the head's weight is {dtype}"
    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3 takes the head's weight away before the backward"
    return None


class _LogProbs:
    """`linear_token_logprobs` under the signature of TRL's autograd function."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        """Return TRL's five outputs, of which ours computes log-probs and entropy."""
        unknown = set(outputs) - {"log_probs", "entropy"}
        if unknown:
            raise ValueError(f"igrpo_head gives no {', '.join(sorted(unknown))}")
        score = partial(
            linear_token_logprobs,
            hidden,
            weight.to(hidden.dtype),
            targets,
            bias=None if bias is None else bias.to(hidden.dtype),
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
        )
        if "entropy" not in outputs:
            return score(), None, None, None, None
        return *score(return_entropy=True), None, None, None
