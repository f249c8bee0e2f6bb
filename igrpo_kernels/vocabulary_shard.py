"""A head whose vocabulary is cut over the ranks of a process group (tensor parallel)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_count, check_rank, check_tensor, describe


@dataclass(frozen=True)
class VocabularyShard:
    """The slice of the vocabulary that this rank's head holds, and the ranks that hold the others.

    The slices follow one another in rank order: this rank's begins at sum(sizes[:rank]). They may
    differ in size and may be empty; rows that only pad the vocabulary are left out by slicing them
    off the weight. Make one with `VocabularyShard.of(weight, group)` and give it to
    `linear_token_logprobs` or `linear_policy_loss` as `shard`, together with the slices of weight
    and bias. Then:

    - Every rank makes the same calls with the same hidden states, targets and other arguments
      (generators in the same state), but its own weight and bias, and runs the same backwards.
      Targets index the whole vocabulary. The number of rows that count is compared once per pass;
      where it differs every rank raises. Any other error of one rank alone leaves the others
      waiting until the group's timeout.
    - Log-probs, entropies, loss and metrics have the same bits on every rank, and so all skip the
      same rows: of each chunk of rows each rank gathers the targets' logits and then the sums of
      every rank (8 bytes per row and rank, 12 with the entropy), and adds them up in rank order.
    - Weight and bias get the gradient of their slice. Hidden states get the whole gradient, summed
      in fp32 over the ranks (one all-reduce per chunk), not this rank's share: where the layer
      below sums it itself, as Megatron's `copy_to_tensor_model_parallel_region` does, leave that
      out; for its `gather_from_sequence_parallel_region` pass tensor_parallel_output_grad=False.

    A value of plain numbers and the group's name: it compares, prints and works under
    torch.compile. Collectives run on the tensors' device: gloo for the CPU, NCCL for CUDA, where it
    is not yet measured. The cut is that of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053).

    Attributes:
        sizes: Rows of the weight on each rank of the group; their sum is V.
        rank: This rank in the group.
        group_name: The group's `group_name`.

    Raises:
        TypeError: A size or `rank` is not an int.
        ValueError: A size is negative, all are zero, or `rank` is not below their number.

    Examples:
        On the last of three ranks, of 170, 170 and 167 tokens:

        >>> shard = VocabularyShard(sizes=(170, 170, 167), rank=2, group_name="tp")
        >>> shard.start, shard.size, shard.vocabulary
        (340, 167, 507)

        On one rank alone:

        >>> from igrpo_kernels import linear_token_logprobs
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> hidden, weight, targets = torch.ones(2, 3), torch.eye(4, 3), torch.tensor([0, 3])
        >>> linear_token_logprobs(hidden, weight, targets, shard=VocabularyShard.of(weight))
        tensor([-1.2143, -2.2143])
        >>> dist.destroy_process_group()
    """

    sizes: tuple[int, ...]
    rank: int
    group_name: str

    def __post_init__(self) -> None:
        if not isinstance(self.sizes, tuple):
            raise TypeError(f"sizes must be a tuple of int, got {describe(self.sizes)}")
        for size in self.sizes:
            check_count("sizes", size, at_least=0)
        check_count("rank", self.rank, at_least=0)
        if sum(self.sizes) == 0:
            raise ValueError(f"sizes must sum to V >= 1, got {self.sizes}")
        if self.rank >= len(self.sizes):
            raise ValueError(f"rank must be < {len(self.sizes)}, as many as sizes, got {self.rank}")

    @classmethod
    def of(cls, weight: Tensor, group: "dist.ProcessGroup | None" = None) -> "VocabularyShard":
        """Gather the sizes of all slices, once; every rank of the group calls it.

        Args:
            weight: This rank's slice of the head's weight (of a DTensor, `to_local()`). Shape
                [size, H].
            group: The process group that the vocabulary is cut over; None: the default group.

        Raises:
            TypeError: `weight` is not a tensor.
            ValueError: `weight` has another shape, or this rank is not in the group.
        """
        check_rank("weight", check_tensor("weight", weight), 2, "[size, H]")
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(f"group must be a process group of this rank, got {describe(group)}")
        sizes = _gather(torch.tensor([weight.shape[0]], device=weight.device), group)
        return cls(tuple(sizes.flatten().tolist()), group.rank(), group.group_name)

    @property
    def start(self) -> int:
        """Where this rank's slice begins."""
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        """How long this rank's slice is."""
        return self.sizes[self.rank]

    @property
    def vocabulary(self) -> int:
        """V, the length of all slices together."""
        return sum(self.sizes)

    @property
    def widest(self) -> int:
        """The length of the longest slice: what chunks of rows are cut by, alike on every rank."""
        return max(self.sizes)

    def add(self, values: Tensor) -> Tensor:
        """Add up what each rank has found about the rows, in rank order: the same bits on each."""
        return _gather(values, self._group).sum(0)

    def maximum(self, values: Tensor) -> Tensor:
        """Take the maximum over the ranks."""
        return _gather(values, self._group).amax(0)

    def sum_(self, values: Tensor) -> Tensor:
        """Overwrite values by their sum over the ranks."""
        dist.all_reduce(values, group=self._group)
        return values

    def check_rows(self, rows: int, device: torch.device) -> None:
        """Check that all ranks have as many rows: a collective of unequal sizes hangs or garbles.

        Raises:
            ValueError: On every rank, where the numbers differ.
        """
        counts = _gather(torch.tensor([rows], device=device), self._group)
        if (counts != rows).any():
            raise ValueError(
                "every rank of a VocabularyShard must bring the same rows, got "
                f"{counts.flatten().tolist()} rows that count on the ranks of "
                f"{self.group_name!r}; give each rank the same hidden states, mask, advantages and "
                "upstream gradients"
            )

    @property
    def _group(self) -> "dist.ProcessGroup":
        from torch.distributed.distributed_c10d import _resolve_process_group

        group = _resolve_process_group(self.group_name)  # type: ignore[arg-type]
        if (group.rank(), group.size()) != (self.rank, len(self.sizes)):
            raise ValueError(
                f"shard must be of rank {group.rank()} of the {group.size()} of its group, got "
                f"{self}; make one on each rank with VocabularyShard.of(weight, group)"
            )
        return group


def check_slice(weight: Tensor, shard: object) -> None:
    """Check that `shard` is one, and that `weight` has the rows that it says this rank holds."""
    if not isinstance(shard, VocabularyShard):
        raise TypeError(
            "shard must be a VocabularyShard, such as VocabularyShard.of(weight, group), got "
            f"{describe(shard)}"
        )
    if weight.shape[0] != shard.size:
        raise ValueError(
            f"weight must be the slice of rank {shard.rank}, with {shard.size} of the "
            f"{shard.vocabulary} rows, got {list(weight.shape)}"
        )


def to_schema(shard: VocabularyShard | None) -> tuple[list[int] | None, str]:
    """Take a shard apart into what the schema of an op can hold."""
    return (None, "") if shard is None else ([shard.rank, *shard.sizes], shard.group_name)


def from_schema(slices: list[int] | None, group: str) -> VocabularyShard | None:
    """Undo `to_schema`."""
    return None if slices is None else VocabularyShard(tuple(slices[1:]), slices[0], group)


def _gather(values: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Stack every rank's values in rank order. Shape [...] to [R, ...]."""
    gathered = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(gathered, values.contiguous(), group=group)
    return torch.stack(gathered)
