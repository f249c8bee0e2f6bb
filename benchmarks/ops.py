"""One op is a batch maker, its peers, what it must give in float64, and its floor."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import batches, exact, peers_linear, peers_logits
from benchmarks.batches import Batch
from benchmarks.cases import BOTH, DTYPES, FORWARD, FROZEN, Case
from benchmarks.exact import Outputs

OURS = "igrpo"
EVERYWHERE = ("cpu", "cuda")
GPU = ("cuda",)
# How far our own outputs may be from float64 before a figure is refused. Gradients leave in the
# inputs' dtype: one rounding, and one of the logits' gradient before the products.
OUR_ERROR = {"fp32": 1e-5, "bf16": 1e-5, "bf16 gradient": 5e-3, "fp32 gradient": 1e-5}
# Beyond this a peer computes something else; log-probs rounded to bf16 come near it.
PEER_ERROR = 0.25


@dataclass(frozen=True)
class Peer:
    """Somebody's way to run an op.

    Attributes:
        run: From a batch to the outputs that the op names.
        devices: Where it runs.
        computes: What it computes instead, if that is not the op.
        exact: What it must give, if that is not what the op must.
    """

    run: Callable[[Batch], Any]
    devices: tuple[str, ...] = EVERYWHERE
    computes: str | None = None
    exact: Callable[[Case, Batch], Outputs] | None = None


@dataclass(frozen=True)
class Op:
    """What is measured.

    Attributes:
        outputs: Names of what a peer returns.
        make: From a case, a seed and a device to a batch.
        exact: From a case and a batch to the outputs and gradients in float64.
        peers: By name; ours first.
        bytes_of: The fewest bytes that must move: inputs read once, outputs written once.
        operations_of: The fewest operations of matrix products.
    """

    outputs: tuple[str, ...]
    make: Callable[[Case, int, torch.device], Batch]
    exact: Callable[[Case, Batch], Outputs]
    peers: dict[str, Peer]
    bytes_of: Callable[[Case], float]
    operations_of: Callable[[Case], float] = lambda case: 0.0

    def step(self, peer: Peer, batch: Batch, case: Case) -> Outputs:
        """Run one pass, or both; the gradients replace those of the last step."""
        batch.clear()
        if case.passes == FORWARD:
            with torch.no_grad():
                outputs = self._outputs(peer.run(batch))
            return outputs
        outputs = self._outputs(peer.run(batch))
        (value,) = outputs.values()
        value.backward(None if value.dim() == 0 else batch.upstream)
        return {name: output.detach() for name, output in outputs.items()} | batch.grads()

    def _outputs(self, returned: Tensor | tuple[Tensor, ...]) -> Outputs:
        returned = returned if isinstance(returned, tuple) else (returned,)
        return dict(zip(self.outputs, returned, strict=False))


def logits_bytes(case: Case, times: int) -> float:
    return times * case.tokens * case.vocabulary * DTYPES[case.dtype].itemsize


def head_bytes(case: Case) -> float:
    """Hidden states and weight read, and in a backward their gradients written."""
    read = (case.tokens + case.vocabulary) * case.width
    written = {FORWARD: 0, FROZEN: case.tokens * case.width, BOTH: read}[case.passes]
    return (read + written) * DTYPES[case.dtype].itemsize


def head_operations(case: Case) -> float:
    """2 T V H per product, of the rows that matter: one forward, one for each gradient."""
    count = {FORWARD: 1, FROZEN: 2, BOTH: 3}[case.passes]
    return 2.0 * count * case.active * case.tokens * case.vocabulary * case.width


SCORES = Op(
    ("logprobs", "entropy"),
    batches.make_logits,
    exact.token_logprobs,
    {
        OURS: Peer(peers_logits.igrpo_scores),
        "torch": Peer(peers_logits.torch_scores),
        "torch.compile": Peer(peers_logits.compiled_scores),
        "TRL": Peer(peers_logits.trl_scores),
        "Liger Triton": Peer(peers_logits.liger_scores, GPU, "log-probs without entropy"),
        "QuACK CE": Peer(peers_logits.quack_scores, GPU, "log-probs without entropy"),
    },
    partial(logits_bytes, times=1),
)
LOGITS_LOSS = Op(
    ("loss",),
    batches.make_logits,
    exact.token_logprobs,
    {
        OURS: Peer(peers_logits.igrpo_loss),
        "torch": Peer(peers_logits.torch_loss),
        "torch.compile": Peer(peers_logits.compiled_loss),
        "TRL": Peer(peers_logits.trl_loss),
        "Liger Triton": Peer(peers_logits.liger_loss, GPU),
        "QuACK CE": Peer(peers_logits.quack_loss, GPU),
    },
    partial(logits_bytes, times=2),
)
CLIPPED = Op(
    ("losses",),
    batches.make_logprobs,
    exact.clipped_policy_loss,
    {
        OURS: Peer(peers_logits.igrpo_clipped),
        "TRL": Peer(peers_logits.trl_clipped),
        "torch.compile": Peer(peers_logits.compiled_clipped),
    },
    lambda case: case.tokens * (5 * 4 + 8),  # the mask is int64, as TRL's is
)
LOSS = Op(
    ("loss",),
    batches.make_logprobs,
    exact.policy_loss,
    {
        OURS: Peer(peers_logits.igrpo_policy_loss),
        "TRL": Peer(peers_logits.trl_policy_loss),
        "torch.compile": Peer(peers_logits.compiled_policy_loss),
    },
    lambda case: case.tokens * (3 * 4 + 8),
)
LINEAR_SCORES = Op(
    ("logprobs",),
    batches.make_linear,
    partial(exact.linear, above=exact.given),
    {
        OURS: Peer(peers_linear.igrpo_logprobs),
        "torch": Peer(peers_linear.torch_logprobs),
        "torch.compile": Peer(peers_linear.compiled_logprobs),
        "TRL": Peer(peers_linear.trl_logprobs),
        "torch linear CE": Peer(peers_linear.torch_linear_logprobs),
        "Liger scaled CE": Peer(peers_linear.liger_scaled_logprobs),
    },
    head_bytes,
    head_operations,
)
LINEAR_LOSS = Op(
    ("loss",),
    batches.make_linear,
    partial(exact.linear, above=exact.of_the_loss),
    {
        OURS: Peer(peers_linear.igrpo_loss),
        "torch": Peer(peers_linear.torch_loss),
        "torch.compile": Peer(peers_linear.compiled_loss),
        "TRL": Peer(peers_linear.trl_loss),
        "torch linear CE": Peer(peers_linear.torch_linear_loss),
        "Liger": Peer(peers_linear.liger_loss),
        "Liger Triton": Peer(peers_linear.liger_triton_loss, GPU),
        "Liger scaled CE": Peer(peers_linear.liger_scaled_loss, GPU),
        "QuACK CE": Peer(
            peers_linear.quack_cross_entropy,
            GPU,
            "cross entropy of every row",
            partial(exact.linear, above=exact.of_cross_entropy),
        ),
    },
    head_bytes,
    head_operations,
)
OPS = {
    ("token_logprobs", FORWARD): SCORES,
    ("token_logprobs", BOTH): LOGITS_LOSS,
    ("clipped_policy_loss", BOTH): CLIPPED,
    ("policy_loss", BOTH): LOSS,
    **{("linear_token_logprobs", passes): LINEAR_SCORES for passes in (FORWARD, BOTH, FROZEN)},
    **{("linear_policy_loss", passes): LINEAR_LOSS for passes in (BOTH, FROZEN)},
}


def op_of(case: Case) -> Op:
    """The op that a case measures."""
    return OPS[case.op, case.passes]


def allowed_error(peer: str, output: str, dtype: str) -> float:
    """How far an output may be from float64 before the peer's figure is refused."""
    if peer != OURS:
        return PEER_ERROR
    return OUR_ERROR[f"{dtype} gradient" if output.endswith("gradient") else dtype]
