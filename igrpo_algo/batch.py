"""From rollouts to what a loss needs, in the layout of your choice.

A `TrainingBatch` is the whole step: prompt ids, completions, advantages, the sampler's log-probs
and the counts that a loss divides by. `padded`, `packed` and `shared_prompt` lay it out in
micro-batches, which add up to the step in loss and gradient, whatever the layout.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from igrpo_kernels.checks import (
    check_callable,
    check_count,
    check_flag,
    check_shape,
    check_tensor,
    describe,
)

from .advantages.of_groups import standardize_by_group
from .fields import check_fields
from .layouts import PackedRow, PaddedRows, pack_sequences, pad_sequences
from .prompts import Prompt, check_ids
from .rollouts.completions import Completion
from .rollouts.records import Rollout, Rollouts, Stage
from .shared_prompt.packing import pack_shared_prompt

DRAFTS, REFINEMENTS = 0, -1
"""Numbers of stages, for `training_batch`."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Some completions of a step, laid out for a model and its loss.

    Attributes:
        layout: The tokens.
        advantages: One per completion. Shape [B], float32.
        old_logprobs: The sampler's log-prob of each token; None if any completion of the step lacks
            them. Shape of the layout's targets, float32.
        groups: Which group each completion belongs to. Shape [B], int64.
        index: Number of each completion in the step, through all groups. Shape [B], int64.
        step_sequences: Completions of the whole step, the denominator of `SequenceMean` and
            `FixedLength`.
        step_tokens: Their tokens, the denominator of `TokenMean`.
    """

    layout: PaddedRows | PackedRow
    advantages: Tensor
    old_logprobs: Tensor | None
    groups: Tensor
    index: Tensor
    step_sequences: int
    step_tokens: int

    def __post_init__(self) -> None:
        check_fields(self)

    def to(self, device: torch.device | str) -> "MicroBatch":
        """Move all tensors."""
        names = ("layout", "advantages", "old_logprobs", "groups", "index")
        known = {name: value for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value.to(device) for name, value in known.items()})

    def model_inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of a transformers model."""
        return self.layout.model_inputs()

    def loss_inputs(self, hidden: Tensor) -> dict[str, Any]:
        """Return the first arguments of `linear_policy_loss` by name.

        `hidden`, `targets`, `advantages`, `old_logprobs`, and `mask` or `cu_seqlens`. If you pass
        logits, `hidden` holds the logits that predict the targets.

        Args:
            hidden: The model's last hidden states. Shape [B, S, H], or [1, S, H] in rows.
        """
        own = {"advantages": self.advantages, "old_logprobs": self.old_logprobs}
        return self.layout.loss_inputs(hidden) | own


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """The completions that a step trains on.

    Attributes:
        prompt_ids: What each completion was drawn from: B lists of token ids.
        completions: B completions, those of a group next to each other.
        advantages: One per completion. Shape [B], float32.
        groups: Which group each belongs to: the completions of one stage of one prompt, or of all
            its stages where they are trained under the question. Shape [B], int64.
        index: Number of each completion in the step, through all groups; `keep` leaves gaps.
            Shape [B], int64.
        step_sequences: Completions of the whole step, those left out by `keep` included. Where
            ranks share a step, put their sum here and into `step_tokens` (`dataclasses.replace`).
        step_tokens: Tokens of all these completions.
    """

    prompt_ids: list[list[int]]
    completions: list[Completion]
    advantages: Tensor
    groups: Tensor
    index: Tensor
    step_sequences: int
    step_tokens: int

    def __post_init__(self) -> None:
        check_fields(self)
        if len(self.prompt_ids) != len(self):
            raise ValueError(
                f"prompt_ids must hold B = {len(self)} lists, got {len(self.prompt_ids)}"
            )
        for name in ("advantages", "groups", "index"):
            check_shape(name, check_tensor(name, getattr(self, name)), [len(self)], "[B]")

    def __len__(self) -> int:
        return len(self.completions)

    def keep(self, mask: Tensor) -> "TrainingBatch":
        """Leave completions out of the model, but not out of the counts that a loss divides by.

        `batch.keep(batch.advantages != 0)` changes no gradient unless the loss has a KL or an
        entropy term, and saves the forward of groups that have no gradient.

        Args:
            mask: True where a completion stays. Shape [B], bool.

        Raises:
            TypeError: `mask` is not a tensor of bool.
            ValueError: `mask` is not of shape [B].
        """
        if check_tensor("mask", mask).dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {describe(mask)}")
        check_shape("mask", mask, [len(self)], "[B]")
        kept = mask.cpu().nonzero()[:, 0]
        return replace(
            self,
            prompt_ids=[self.prompt_ids[i] for i in kept],
            completions=[self.completions[i] for i in kept],
            advantages=self.advantages[kept],
            groups=self.groups[kept],
            index=self.index[kept],
        )

    def padded(self, pad_token_id: int, *, max_tokens: int | None = None) -> list[MicroBatch]:
        """Put each completion after its prompt, in rows padded on the right.

        Args:
            pad_token_id: What fills the rows.
            max_tokens: Maximum tokens of a micro-batch with padding; None makes one micro-batch.

        Returns:
            The micro-batches, on the CPU; none if there are no completions.

        Raises:
            ValueError: A sequence exceeds `max_tokens`.
        """
        layouts = pad_sequences(
            self.prompt_ids, self._token_ids, pad_token_id=pad_token_id, max_tokens=max_tokens
        )
        return self._lay_out(layouts)

    def packed(self, *, max_tokens: int | None = None) -> list[MicroBatch]:
        """Lay the sequences one after the other in rows, without padding.

        The model must keep the sequences of a row apart by `position_ids`, as transformers' models
        of attention alone do; a recurrent layer would carry its state from one into the next.

        Args:
            max_tokens: Maximum tokens of a row; None makes one row.

        Returns:
            The micro-batches, one row each, on the CPU; none if there are no completions.

        Raises:
            ValueError: A sequence exceeds `max_tokens`.
        """
        layouts = pack_sequences(self.prompt_ids, self._token_ids, max_tokens=max_tokens)
        return self._lay_out(layouts)

    def shared_prompt(self, max_tokens: int | None = None) -> list[MicroBatch]:
        """Lay each group's prompt once, and its completions after it. See `pack_shared_prompt`.

        Call `enable_shared_prompt` on the model first.

        Args:
            max_tokens: Maximum tokens of a row; None makes one row.

        Returns:
            The micro-batches, one row each, on the CPU; none if there are no completions.

        Raises:
            ValueError: A prompt and one of its completions exceed `max_tokens`.
        """
        if not len(self):
            return []
        positions = groupby(range(len(self)), key=self.groups.tolist().__getitem__)
        members = [list(group) for _, group in positions]
        prompts = [self.prompt_ids[group[0]] for group in members]
        completions = [[self.completions[i] for i in group] for group in members]
        return self._lay_out(pack_shared_prompt(prompts, completions, max_tokens=max_tokens))

    @property
    def _token_ids(self) -> list[list[int]]:
        return [completion.token_ids for completion in self.completions]

    def _lay_out(self, layouts: Iterable[PaddedRows | PackedRow]) -> list[MicroBatch]:
        known = all(completion.logprobs is not None for completion in self.completions)
        return [
            MicroBatch(
                layout,
                self.advantages[layout.index],
                layout.place([self.completions[i].logprobs or [] for i in layout.index])
                if known
                else None,
                self.groups[layout.index],
                self.index[layout.index],
                self.step_sequences,
                self.step_tokens,
            )
            for layout in layouts
        ]


def training_batch(
    rollouts: Rollouts,
    *,
    advantages: Callable[[Tensor], Tensor] = standardize_by_group,
    stages: Sequence[int] = (REFINEMENTS,),
    under_question: bool = False,
    encode: Callable[[Prompt], list[int]] | None = None,
) -> TrainingBatch:
    """Make the batch that a step trains on.

    The paper trains on the refinements alone, under q': iGRPO, arXiv:2602.09000, equations 4 and 5.
    Drafts, where they are trained too, are groups of their own, under q. Completions without tokens
    (skipped, cancelled) add nothing to a loss and are left out; they still count in
    `step_sequences`.

    Args:
        rollouts: What `two_stage_rollout` returned, or `Rollouts.of` a stream.
        advantages: From rewards [P, N] or [P, G], NaN where unscored, to advantages of the same
            shape: `standardize_by_group`, `center_by_group`, `rloo` or your own. It is called once
            per stage, or once for all, as [P, N + G], where they are one group.
        stages: Numbers of the stages that are trained: `REFINEMENTS` (the last round of them),
            `DRAFTS`, or the number of a round, from 1.
        under_question: Train what these stages drew for a prompt as one group under q. Refinements
            were drawn under q', and their `old_logprobs` are those under q': a surrogate that
            weighs tokens by their ratio, such as `Cispo(1.0)`, corrects for that. Of a sampler
            without log-probs there are none, and nothing is corrected.
        encode: From a prompt to its token ids, for rollouts of a sampler that has no `encode`.

    Returns:
        The batch, on the CPU.

    Raises:
        TypeError: `rollouts` are not Rollouts, a number in `stages` is not an int, `under_question`
            not a bool, or what `encode` or `advantages` returned is of another type.
        ValueError: There are no prompts, a stage does not exist, draws nothing or is named twice,
            there are no prompt ids and no `encode`, a prompt has no tokens, or what `advantages`
            returned has another shape or is not finite.

    Examples:
        >>> from igrpo_algo import Completion, two_stage_rollout
        >>> def sampler(prompts, n, seed):
        ...     return [[Completion([7 + i], str(i)) for i in range(n)] for _ in prompts]
        >>> def reward(prompts, completions):
        ...     return [float(c) for c in completions]
        >>> rollouts = two_stage_rollout(["q"], sampler, reward, num_refinements=2)
        >>> batch = training_batch(rollouts, encode=lambda prompt: [5, 6])
        >>> (micro,) = batch.padded(pad_token_id=0)
        >>> micro.layout.input_ids, micro.advantages, micro.step_sequences
        (tensor([[5, 6, 7], [5, 6, 8]]), tensor([-0.7070,  0.7070]), 2)
    """
    if not isinstance(rollouts, Rollouts):
        raise TypeError(f"rollouts must be Rollouts, got {describe(rollouts)}")
    if not len(rollouts):
        raise ValueError("rollouts must hold at least one prompt, got none")
    check_callable("advantages", advantages)
    check_flag("under_question", under_question)
    if encode is not None:
        check_callable("encode", encode)
    trained = [
        [rollout.stages[number] for rollout in rollouts]
        for number in _check_stages(stages, rounds=len(rollouts[0].refinements))
    ]
    if any(not drawn[0].completions for drawn in trained):
        raise ValueError("stages must have completions, got a stage without any")
    if under_question:
        drawn = zip(*trained, strict=True)
        trained = [[_as_one_stage(r, stages) for r, stages in zip(rollouts, drawn, strict=True)]]
    values = torch.cat([_stage_advantages(advantages, drawn) for drawn in trained])
    groups = [stage for drawn in trained for stage in drawn]
    completions = [completion for stage in groups for completion in stage.completions]
    sizes = torch.tensor([len(stage.completions) for stage in groups])
    lengths = torch.tensor([length for stage in groups for length in stage.lengths])
    batch = TrainingBatch(
        [ids for stage in groups for ids in [_prompt_ids(stage, encode)] * len(stage.completions)],
        completions,
        values,
        groups=torch.arange(len(groups)).repeat_interleave(sizes),
        index=torch.arange(len(completions)),
        step_sequences=len(completions),
        step_tokens=int(lengths.sum()),
    )
    return batch.keep(lengths > 0)


def _check_stages(stages: Sequence[int], *, rounds: int) -> list[int]:
    """Return the numbers of the stages as indices of `Rollout.stages`, each once."""
    if isinstance(stages, str) or not isinstance(stages, Sequence) or not stages:
        raise TypeError(f"stages must be a list of stage numbers, got {describe(stages)}")
    numbers: list[int] = []
    for number in stages:
        check_count("each of stages", number, at_least=REFINEMENTS)
        if number > rounds or number % (rounds + 1) in numbers:
            raise ValueError(
                f"stages must name each of the stages 0 (drafts) to {rounds} at most once, "
                f"got {list(stages)}"
            )
        numbers.append(number % (rounds + 1))
    return numbers


def _as_one_stage(rollout: Rollout, stages: Sequence[Stage]) -> Stage:
    """Put what some stages drew for a prompt under the question."""
    return Stage(
        rollout.drafts.prompt,
        [completion for stage in stages for completion in stage.completions],
        [reward for stage in stages for reward in stage.rewards],
        rollout.drafts.prompt_ids,
    )


def _stage_advantages(advantages: Callable[[Tensor], Tensor], drawn: Sequence[Stage]) -> Tensor:
    rewards = torch.tensor([stage.rewards for stage in drawn])
    values = check_tensor("the result of advantages", advantages(rewards))
    check_shape("the result of advantages", values, rewards.shape, "of the rewards")
    if not values.isfinite().all():
        raise ValueError(f"the result of advantages must be finite, got {values.tolist()}")
    return values.detach().flatten().to("cpu", torch.float32)


def _prompt_ids(stage: Stage, encode: Callable[[Prompt], list[int]] | None) -> list[int]:
    ids = stage.prompt_ids
    if ids is None:
        if encode is None:
            raise ValueError("encode must be given: the rollouts' sampler has none")
        ids = check_ids("the result of encode", encode(stage.prompt))
    if not ids:
        raise ValueError(f"prompt_ids must have at least one token, got none of {stage.prompt!r}")
    return ids
