"""What each rank runs in `test_sharded_vocabulary.py`: every case, sharded and not; saves both.

Run as `python sharded_ranks.py RANK WORLD FOLDER`, once per rank, on gloo.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from igrpo_kernels import (
    K1,
    K3,
    Cispo,
    Clip,
    FixedLength,
    RatioWeighted,
    Reinforce,
    Sapo,
    SequenceClip,
    SequenceMean,
    Sum,
    TokenMean,
    VocabularyShard,
    cpu_head_softmax,
    linear_policy_loss,
    linear_token_logprobs,
)
from igrpo_kernels.surrogates import DppoTv, Gmpo, SequenceTokenClip, Vespo

B, T, H, V = 4, 5, 6, 507
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
SPLITS = {  # rows of the weight on each rank
    2: {"uneven": (400, 107), "empty": (0, 507)},
    3: {"uneven": (1, 505, 1), "empty": (200, 0, 307)},
}

Outputs = list[tuple[str, Tensor]]


@dataclass
class Batch:
    """The leaves, and what else an op is given; `weight` and `bias` may be of a slice."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    shard: VocabularyShard | None = None

    def sliced(self, shard: VocabularyShard) -> "Batch":
        """The same batch, with this rank's slice of the head."""
        rows = slice(sum(shard.sizes[: shard.rank]), sum(shard.sizes[: shard.rank + 1]))
        parts = (self.hidden, self.weight[rows], self.bias[rows])
        leaves = [part.detach().clone().requires_grad_() for part in parts]
        rest = (self.targets, self.old_logprobs, self.ref_logprobs, self.advantages, self.mask)
        return Batch(*leaves, *rest, shard=shard)

    def gradients(self, *outputs: Tensor, upstream: list[Tensor] | None = None) -> Outputs:
        leaves = (self.hidden, self.weight, self.bias)
        found = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
        return list(zip(("hidden gradient", "weight", "bias"), found, strict=True))

    def logprobs(self, **options: Any) -> Any:
        options = {"bias": self.bias, "mask": self.mask, **options}
        return linear_token_logprobs(
            self.hidden, self.weight, self.targets, shard=self.shard, **options
        )

    def loss(self, **options: Any) -> Any:
        options = {"bias": self.bias, "old_logprobs": self.old_logprobs, **options}
        options = {"surrogate": Clip(0.2, 0.28), "aggregate": TokenMean(), **options}
        given = (self.hidden, self.weight, self.targets, self.advantages, self.mask)
        return linear_policy_loss(*given, shard=self.shard, **options)


def make_batch(dtype: torch.dtype = torch.float64, scale: float = 2.0, level: float = 0.0) -> Batch:
    """Targets at 0 and V - 1 and in every slice; masked slots hold what must not matter."""
    torch.manual_seed(0)
    hidden = torch.randn(B, T, H).to(dtype)
    weight = (torch.randn(V, H) * scale / H**0.5).to(dtype)
    bias = (torch.randn(V) + level).to(dtype)
    targets = torch.randint(0, V, (B, T))
    targets[0, :3] = torch.tensor([0, V - 1, 250])
    targets[1] = torch.tensor([1, 169, 399, 506, 450])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    old = (logprobs + 0.4 * torch.randn(B, T)).to(wide)
    ref = (logprobs + torch.randn(B, T)).to(wide)
    out = MASK == 0
    hidden[out], targets[out], old[out], ref[out] = torch.nan, -100, torch.inf, torch.nan
    advantages = torch.tensor([1.5, -0.5, 0.0, 0.7], dtype=wide)
    leaves = [leaf.requires_grad_() for leaf in (hidden, weight, bias)]
    return Batch(*leaves, targets, old, ref, advantages, MASK.clone())


def of_logprobs(batch: Batch, **options: Any) -> Outputs:
    """Log-probs, entropies, and their gradients for rows of which some have no upstream."""
    logprobs, entropy = batch.logprobs(**options, return_entropy=True)
    torch.manual_seed(1)
    upstream = torch.randn(2, B, T).to(logprobs.dtype)
    upstream[:, 1, ::2] = 0
    gradients = batch.gradients(logprobs, entropy, upstream=list(upstream))
    return [("log-probs", logprobs), ("entropies", entropy), *gradients]


def of_loss(batch: Batch, **options: Any) -> Outputs:
    """The loss, its metrics and its gradients."""
    if options.get("kl_coef") is not None:
        options["ref_logprobs"] = batch.ref_logprobs
    out = batch.loss(**options)
    return [("loss", out.loss), *out.metrics.items(), *batch.gradients(out.loss * 1.7)]


def twice(batch: Batch, run: Callable[[Batch], Tensor]) -> Outputs:
    """The gradients of a second and a third backward over one forward."""
    value = run(batch)
    first = batch.gradients(value)
    second = batch.gradients(4 * value)  # exact: a power of two
    assert all(torch.equal(4 * a, b) for (_, a), (_, b) in zip(first, second, strict=True))
    return [("value", value), *second]


def frozen(batch: Batch) -> Outputs:
    """No gradient for the hidden states: nothing is reduced; one of the weight alone."""
    batch.hidden, batch.bias = batch.hidden.detach(), batch.bias.detach()
    value = batch.loss().loss
    return [("loss", value), ("weight", torch.autograd.grad(value, batch.weight)[0])]


def in_many_chunks(batch: Batch, run: Callable[[Batch], Outputs]) -> Outputs:
    budget, cpu_head_softmax.CHUNK_BYTES = cpu_head_softmax.CHUNK_BYTES, 4 * 400 * 3
    try:
        return run(batch)
    finally:
        cpu_head_softmax.CHUNK_BYTES = budget


def make_banned() -> Batch:
    """A bias of -inf on every token from 400 on: where the split is uneven, on a whole slice."""
    batch = make_batch()
    with torch.no_grad():
        batch.bias[400:] = -torch.inf
    return batch


def without_bias(batch: Batch) -> Outputs:
    """One temperature per token, and a head of a weight alone."""
    temperatures = torch.linspace(0.5, 2.0, B * T).view(B, T)
    out = batch.loss(bias=None, temperature=temperatures, aggregate=SequenceMean())
    return [("loss", out.loss), ("weight", torch.autograd.grad(out.loss, batch.weight)[0])]


HEAD = {"temperature": 0.7, "softcap": 5.0, "logit_scale": 1.3}
SURROGATES = [
    Clip(0.2, 0.2, dual=3.0),
    Cispo(max_ratio=1.2),
    Sapo(),
    Reinforce(),
    DppoTv(low=0.02, high=0.02),
    SequenceClip(),
    SequenceTokenClip(),
    Gmpo(),
    Vespo(),
]
CASES: dict[str, tuple[Callable[[], Batch], Callable[[Batch], Outputs]]] = {
    "log-probs": (make_batch, of_logprobs),
    "log-probs, cap, scale, temperature": (make_batch, partial(of_logprobs, **HEAD)),
    "log-probs, chunks": (make_batch, partial(in_many_chunks, run=of_logprobs)),
    "log-probs, logits far below -88": (partial(make_batch, level=-900.0), of_logprobs),
    "log-probs, logits far apart": (partial(make_batch, scale=300.0), of_logprobs),
    "log-probs, banned tokens": (make_banned, of_logprobs),
    "log-probs, second backward": (
        make_batch,
        partial(twice, run=lambda batch: batch.logprobs().sum()),
    ),
    "loss, chunks": (make_batch, partial(in_many_chunks, run=of_loss)),
    "loss, all metrics": (make_batch, partial(of_loss, all_metrics=True, return_entropy=True)),
    "loss, KL and entropy": (
        make_batch,
        partial(of_loss, kl_coef=0.1, kl=RatioWeighted(K3()), entropy_coef=0.05, **HEAD),
    ),
    "loss, sequence level, KL and entropy": (
        make_batch,
        partial(of_loss, surrogate=SequenceClip(), kl_coef=0.1, kl=K1(), entropy_coef=0.05, **HEAD),
    ),
    "loss, importance weights": (
        make_batch,
        partial(of_loss, importance_weights=torch.tensor([0.5, 1.5, 0.0, 2.0])),
    ),
    "loss, no bias, temperature per token": (make_batch, without_bias),
    "loss, frozen trunk": (make_batch, frozen),
    "loss, second backward": (make_batch, partial(twice, run=lambda batch: batch.loss().loss)),
    **{
        f"loss, {surrogate!r}": (
            make_batch,
            partial(of_loss, surrogate=surrogate, aggregate=aggregate),
        )
        for surrogate, aggregate in zip(
            SURROGATES,
            [SequenceMean(), FixedLength(7), Sum(denominator=3.0)] * 3,
            strict=True,
        )
    },
}
ROUNDED: dict[str, tuple[Callable[[torch.dtype], Batch], Callable[[Batch], Outputs]]] = {
    "log-probs": (make_batch, of_logprobs),
    "loss": (make_batch, partial(of_loss, kl_coef=0.1)),
}
DTYPES = (torch.float32, torch.bfloat16)


def run_case(make: Callable[[], Batch], run: Callable[[Batch], Outputs], shard: Any) -> Outputs:
    whole = make()
    batch = whole if shard is None else whole.sliced(shard)
    return [(name, value.detach()) for name, value in run(batch)]


def refused(shard: VocabularyShard) -> str:
    """What is said where one rank masks a row that the others count."""
    batch = make_batch().sliced(shard)
    batch.mask[0, 0] = 0 if shard.rank == 0 else 1
    try:
        batch.loss()
    except ValueError as error:
        return str(error)
    return ""


def compiled(shard: VocabularyShard) -> dict[str, tuple[Outputs, Outputs]]:
    """Both ops under torch.compile, and not."""
    found = {}
    for name, run in {
        "log-probs": lambda batch: batch.logprobs(),
        "loss": lambda batch: batch.loss(entropy_coef=0.1).loss,
    }.items():
        batch = make_batch().sliced(shard)
        value = torch.compile(run, fullgraph=True, backend="aot_eager")(batch)
        exact = run(batch)
        ones = [torch.ones_like(exact)]
        found[name] = (
            [("value", value.detach()), *batch.gradients(value, upstream=ones)],
            [("value", exact.detach()), *batch.gradients(exact, upstream=ones)],
        )
    return found


def in_a_smaller_group(rank: int) -> list[Outputs] | str:
    """Ranks 0 and 2 of three by themselves; what the other is told."""
    group = dist.new_group([0, 2])
    size = SPLITS[2]["uneven"][rank // 2]
    try:
        shard = VocabularyShard.of(torch.empty(size, H), group)
    except ValueError as error:
        return str(error)
    return [run_case(make_batch, run, shard) for run in (of_logprobs, of_loss)]


def exact(name: str, dtype: torch.dtype) -> Outputs:
    """The unsharded result of a rounded case in float64."""
    make, run = ROUNDED[name]
    batch = make(dtype)
    wide = [
        value.detach().double().requires_grad_()
        for value in (batch.hidden, batch.weight, batch.bias)
    ]
    rest = [batch.old_logprobs.double(), batch.ref_logprobs.double(), batch.advantages.double()]
    batch = Batch(*wide, batch.targets, *rest, batch.mask)
    return [(name, value.detach()) for name, value in run(batch)]


def unsharded() -> dict[str, Any]:
    """What every sharded result is compared with."""
    rounded = [(name, dtype) for name in ROUNDED for dtype in DTYPES]
    return {
        "smaller": [run_case(make_batch, run, None) for run in (of_logprobs, of_loss)],
        "wanted": {name: run_case(*case, None) for name, case in CASES.items()},
        "exact": {(name, dtype): exact(name, dtype) for name, dtype in rounded},
        "rounded": {
            (name, dtype): run_case(partial(ROUNDED[name][0], dtype), ROUNDED[name][1], None)
            for name, dtype in rounded
        },
    }


def main(rank: int, world: int, folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    seen: dict[str, Any] = {"shards": {}, "cases": {}, "rounded": {}}
    for split, sizes in SPLITS[world].items():
        shard = VocabularyShard.of(torch.empty(sizes[rank], H))
        seen["shards"][split] = shard
        for name, case in CASES.items():
            seen["cases"][split, name] = [run_case(*case, shard) for _ in range(2)]
        for name, (make, run) in ROUNDED.items():
            for dtype in DTYPES:
                case = (partial(make, dtype), run)
                seen["rounded"][split, name, dtype] = run_case(*case, shard)
        seen["refused", split] = refused(shard)
    if world == 2:
        seen["compiled"] = compiled(seen["shards"]["uneven"])
    if world == 3:
        seen["smaller"] = in_a_smaller_group(rank)
    if rank == 0:
        torch.save(unsharded(), folder / "unsharded.pt")
    seen["shards"] = {name: (shard.sizes, shard.rank) for name, shard in seen["shards"].items()}
    torch.save(seen, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
