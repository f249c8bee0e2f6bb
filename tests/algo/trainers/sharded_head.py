"""What each of two ranks runs in `test_trl_two_ranks`: the loss in a forward that is wrapped."""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from tiny_qwen import make_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from igrpo_algo.trainers.trl.hidden_states import HeadInput, add_head_argument
from igrpo_kernels import Clip, SequenceMean, linear_policy_loss, linear_token_logprobs


def data(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and advantages; rank 1 has nothing to learn from, and takes part all the same."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(4, 99, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return ids, mask, torch.randn(3, generator=generator) * (rank == 0)


def forward(model: nn.Module, rank: int) -> dict[str, Any]:
    ids, mask, advantages = data(rank)

    def head(given: HeadInput) -> dict[str, Tensor | None]:
        assert type(given.weight) in (Tensor, nn.Parameter)  # whole, however it is kept
        assert given.weight.shape == (100, 16)
        hidden, targets, counted = given.hidden[:, 3:-1], ids[:, 4:], mask[:, 4:]
        loss = linear_policy_loss(
            hidden, given.weight, targets, advantages, counted,
            surrogate=Clip(), aggregate=SequenceMean(denominator=6.0),
        )  # fmt: skip
        scores = linear_token_logprobs(hidden, given.weight, targets, mask=counted)
        return {"loss": loss.loss + scores.mean() * 0.1, "logprobs": scores.detach()}

    out: dict[str, Any] = model(input_ids=ids, attention_mask=mask, head=head)
    return out


def compare(wrapper: str) -> None:
    rank = dist.get_rank()
    plain, wrapped = make_model(), make_model()
    for model in (plain, wrapped):
        add_head_argument(model)
    whole = [forward(plain, each) for each in range(2)]
    sum(out["loss"] for out in whole).div(2).backward()
    if wrapper.startswith("fsdp2"):
        for layer in wrapped.model.layers:
            fully_shard(layer)
        if wrapper == "fsdp2-apart":
            fully_shard(wrapped.lm_head)
        model: nn.Module = fully_shard(wrapped)
        with torch.no_grad():  # a forward without a backward leaves nothing gathered behind
            forward(model, rank)
        if wrapper == "fsdp2-apart":
            assert type(wrapped.lm_head.weight).__name__ == "DTensor"
    else:
        model = DistributedDataParallel(wrapped)
    out = forward(model, rank)
    out["loss"].backward()
    # Sums of two ranks run in another order than one after the other: float32 rounding.
    torch.testing.assert_close(out["logprobs"], whole[rank]["logprobs"], rtol=1e-5, atol=1e-6)
    for (name, own), (_, other) in zip(
        wrapped.named_parameters(), plain.named_parameters(), strict=True
    ):
        grad = own.grad.full_tensor() if hasattr(own.grad, "full_tensor") else own.grad
        torch.testing.assert_close(grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert float(plain.lm_head.weight.grad.abs().max()) > 1e-3
    print(f"rank {rank} agrees in {wrapper};")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for wrapper in sys.argv[1:]:
        compare(wrapper)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a thread of torch's that is still there when Python ends aborts the process
