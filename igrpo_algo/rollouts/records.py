"""The result of a two-stage rollout: one `Group` per prompt, `Rollouts` for many; and their file.

Everything that happened to a prompt is a plain value in its `Group`; `Rollouts` lays P groups out
prompt-major, as tensors [P, N] and [P, G]. Files hold safetensors: nothing unpickles.
"""

import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from .completions import Completion, pack_completions
from .sampling import Prompt, Samples


@dataclass(frozen=True)
class Stage:
    """Completions drawn from one prompt, and their scores.

    Attributes:
        prompt: What they were drawn from: q, or q' with a draft in it.
        completions: N drafts or G refinements; those of a skipped prompt have no tokens and the
            finish reason "skipped", so that rows stay aligned.
        rewards: One per completion; NaN where it could not be scored, was cancelled or skipped.
        started: When sampling began, in seconds since the rollout did; not compared.
        ended: When sampling ended; not compared.
    """

    prompt: Prompt
    completions: list[Completion]
    rewards: list[float]
    started: float = field(default=0.0, compare=False)
    ended: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Choice:
    """Which draft a refinement round was given, and why.

    Attributes:
        index: The chosen completion among all so far: the N drafts, then the refinements of
            earlier rounds; -1 where none was scored.
        reward: Its reward; NaN where none was scored.
        draft: Its text as it stands in the prompt; empty where the round saw the plain prompt.
        tokens_cut: Tokens of it that were cut off for length.
        failed: No completion so far reached `failed_below`.
        dropped: Draft dropout took the draft away.
        skipped: The prompt was skipped, and the round's completions have no tokens.
    """

    index: int
    reward: float
    draft: str = ""
    tokens_cut: int = 0
    failed: bool = False
    dropped: bool = False
    skipped: bool = False


@dataclass(frozen=True)
class Group:
    """All that happened to one prompt.

    Attributes:
        index: Position of the prompt among those of the rollout.
        drafts: Stage 1.
        choices: The draft of each refinement round.
        refinements: Stage 2, one per round.
    """

    index: int
    drafts: Stage
    choices: list[Choice]
    refinements: list[Stage]

    def to_json(self) -> dict[str, Any]:
        """Give the group as what JSON can say; NaN becomes null."""
        record = asdict(self)
        for stage in (record["drafts"], *record["refinements"]):
            stage["rewards"] = [None if math.isnan(r) else r for r in stage["rewards"]]
        for choice in record["choices"]:
            choice["reward"] = None if math.isnan(choice["reward"]) else choice["reward"]
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Group":
        """Read back what `to_json` gave."""
        choices = [
            Choice(**{**choice, "reward": _from_null(choice["reward"])})
            for choice in record["choices"]
        ]
        refinements = [_stage_from_json(stage) for stage in record["refinements"]]
        return cls(record["index"], _stage_from_json(record["drafts"]), choices, refinements)


@dataclass(frozen=True)
class Rollouts:
    """The groups of P prompts, prompt-major.

    Tensors are made anew at each access, on the CPU; keep the ones you use in a loop. What is said
    of refinements is said of the last round; `until_round` shows an earlier one.

    Row p * G + g of `refinements.padded()` is element [p, g] of every [P, G] tensor, so
    `refinement_rewards`, or advantages made of it, fits the rows once flattened. A skipped prompt
    keeps its G rows: rewards of NaN and a mask that is False throughout. In a loss they add
    nothing, but `SequenceMean` counts them unless it is given a `denominator`.

    Attributes:
        groups: One per prompt, each with the same numbers of drafts and rounds.

    Raises:
        ValueError: The groups differ in the number of drafts, of rounds or of refinements.

    Examples:
        >>> from igrpo_algo import Completion, two_stage_rollout
        >>> def sampler(prompts, n, seed):
        ...     return [[Completion([i], str(i)) for i in range(n)] for _ in prompts]
        >>> def reward(prompts, completions):
        ...     return [float(c) for c in completions]
        >>> rollouts = two_stage_rollout(["q"], sampler, reward, num_drafts=3, num_refinements=2)
        >>> rollouts.draft_rewards, rollouts.refinement_rewards
        (tensor([[0., 1., 2.]]), tensor([[0., 1.]]))
    """

    groups: list[Group]

    def __post_init__(self) -> None:
        for what, sizes in {
            "drafts": {len(group.drafts.completions) for group in self.groups},
            "rounds": {len(group.refinements) for group in self.groups},
            "refinements": {
                len(stage.completions) for group in self.groups for stage in group.refinements
            },
        }.items():
            if len(sizes) > 1:
                raise ValueError(f"groups must have equally many {what}, got {sorted(sizes)}")

    @classmethod
    def of(cls, groups: Iterable[Group]) -> "Rollouts":
        """Collect groups in whatever order a stream gave them, and sort them by prompt."""
        return cls(sorted(groups, key=lambda group: group.index))

    @classmethod
    def concat(cls, parts: Iterable["Rollouts"]) -> "Rollouts":
        """Join rollouts in the order given; each group keeps its `index`."""
        return cls([group for part in parts for group in part.groups])

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    @overload
    def __getitem__(self, which: int) -> Group: ...

    @overload
    def __getitem__(self, which: slice) -> "Rollouts": ...

    def __getitem__(self, which: int | slice) -> "Group | Rollouts":
        return Rollouts(self.groups[which]) if isinstance(which, slice) else self.groups[which]

    def until_round(self, number: int) -> "Rollouts":
        """Show the rollouts as they stood after refinement round `number`, counted from 1."""
        rounds = len(self.groups[0].refinements) if self.groups else number
        if not 1 <= number <= rounds:
            raise ValueError(f"number must be a round from 1 to {rounds}, got {number}")
        return Rollouts(
            [
                replace(g, choices=g.choices[:number], refinements=g.refinements[:number])
                for g in self.groups
            ]
        )

    @property
    def prompts(self) -> list[Prompt]:
        """The P original prompts."""
        return [group.drafts.prompt for group in self.groups]

    @property
    def drafts(self) -> Samples:
        """Stage 1: prompts, completions, and their padded and packed tensors."""
        return _samples([group.drafts for group in self.groups])

    @property
    def refinements(self) -> Samples:
        """Stage 2: spliced prompts, completions, and their tensors; no tokens where skipped."""
        return _samples([group.refinements[-1] for group in self.groups])

    @property
    def draft_rewards(self) -> Tensor:
        """Reward of each draft, NaN where unscored. Shape [P, N], float32."""
        return _table([group.drafts.rewards for group in self.groups], torch.float32)

    @property
    def refinement_rewards(self) -> Tensor:
        """Reward of each refinement, NaN where unscored or skipped. Shape [P, G], float32."""
        rows = [group.refinements[-1].rewards for group in self.groups]
        return _table(rows, torch.float32)

    @property
    def draft_lengths(self) -> Tensor:
        """Tokens of each draft. Shape [P, N], int64."""
        return _table(_lengths(group.drafts for group in self.groups), torch.int64)

    @property
    def refinement_lengths(self) -> Tensor:
        """Tokens of each refinement, 0 where skipped. Shape [P, G], int64."""
        return _table(_lengths(group.refinements[-1] for group in self.groups), torch.int64)

    @property
    def chosen(self) -> Tensor:
        """Index of each prompt's draft; -1 where none was scored. Shape [P], int64."""
        return torch.tensor([choice.index for choice in self._choices], dtype=torch.int64)

    @property
    def found(self) -> Tensor:
        """Whether any draft of the prompt was scored. Shape [P], bool."""
        return torch.tensor([choice.index >= 0 for choice in self._choices], dtype=torch.bool)

    @property
    def failed(self) -> Tensor:
        """Whether no draft reached `failed_below`. Shape [P], bool."""
        return torch.tensor([choice.failed for choice in self._choices], dtype=torch.bool)

    @property
    def dropped(self) -> Tensor:
        """Whether draft dropout took the draft away. Shape [P], bool."""
        return torch.tensor([choice.dropped for choice in self._choices], dtype=torch.bool)

    @property
    def skipped(self) -> Tensor:
        """Whether the prompt was skipped: no refinement has tokens. Shape [P], bool."""
        return torch.tensor([choice.skipped for choice in self._choices], dtype=torch.bool)

    @property
    def conditioned(self) -> Tensor:
        """Whether the refinements saw a draft. Shape [P], bool."""
        return torch.tensor([choice.draft != "" for choice in self._choices], dtype=torch.bool)

    @property
    def tokens_cut(self) -> Tensor:
        """Draft tokens cut off for length. Shape [P], int64."""
        return torch.tensor([choice.tokens_cut for choice in self._choices], dtype=torch.int64)

    @property
    def cancelled(self) -> Tensor:
        """Drafts that early selection cancelled. Shape [P], int64."""
        counts = [
            sum(draft.finish_reason == "cancelled" for draft in group.drafts.completions)
            for group in self.groups
        ]
        return torch.tensor(counts, dtype=torch.int64)

    @property
    def times(self) -> Tensor:
        """Start and end of each stage in seconds. Shape [P, 1 + rounds, 2], float64."""
        rows = [
            [(stage.started, stage.ended) for stage in (group.drafts, *group.refinements)]
            for group in self.groups
        ]
        return torch.tensor(rows, dtype=torch.float64) if rows else torch.zeros(0, 0, 2).double()

    @property
    def _choices(self) -> list[Choice]:
        return [group.choices[-1] for group in self.groups]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: the whole of it or nothing (a temporary file is renamed).

        Token ids and log-probs are tensors, all else is JSON inside a tensor of bytes.

        Raises:
            TypeError: A prompt holds what JSON cannot say (an image, say).
        """
        from safetensors.torch import save

        records = [group.to_json() for group in self.groups]
        for record in records:
            for completion in _completion_records(record):
                known = completion.pop("logprobs") is not None
                completion.update(token_ids=len(completion["token_ids"]), logprobs=known)
        packed = pack_completions(_all_completions(self.groups))
        logprobs = [x for c in _all_completions(self.groups) for x in c.logprobs or []]
        tensors = {
            "token_ids": packed.ids,
            "logprobs": torch.tensor(logprobs, dtype=torch.float64),
            "json": torch.frombuffer(bytearray(json.dumps(records).encode()), dtype=torch.uint8),
        }
        write_whole(Path(path), save(tensors, metadata={"format": _FORMAT}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Rollouts":
        """Read what `save` wrote.

        Raises:
            ValueError: The file is none of ours, or broken.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("format") != _FORMAT:
                    raise ValueError(f"path: {os.fspath(path)} holds no rollouts")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"path: {os.fspath(path)} is no safetensors file: {error}") from error
        ids, logprobs = iter(tensors["token_ids"].tolist()), iter(tensors["logprobs"].tolist())
        records = json.loads(bytes(tensors["json"].numpy()))
        for record in records:
            for completion in _completion_records(record):
                count, known = completion["token_ids"], completion["logprobs"]
                completion["token_ids"] = [next(ids) for _ in range(count)]
                completion["logprobs"] = [next(logprobs) for _ in range(count)] if known else None
        return cls([Group.from_json(record) for record in records])


_FORMAT = "igrpo rollouts 1"


def _samples(stages: list[Stage]) -> Samples:
    return Samples([stage.prompt for stage in stages], [stage.completions for stage in stages])


def _lengths(stages: Iterable[Stage]) -> list[list[int]]:
    return [[len(completion.token_ids) for completion in stage.completions] for stage in stages]


def _table(rows: list[Any], dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype).reshape(len(rows), len(rows[0]) if rows else 0)


def _from_null(number: float | None) -> float:
    return math.nan if number is None else number  # one object: groups compare equal


def _stage_from_json(record: dict[str, Any]) -> Stage:
    completions = [Completion(**completion) for completion in record["completions"]]
    rewards = [_from_null(reward) for reward in record["rewards"]]
    return Stage(**{**record, "completions": completions, "rewards": rewards})


def _all_completions(groups: Iterable[Group]) -> list[Completion]:
    return [
        completion
        for group in groups
        for stage in (group.drafts, *group.refinements)
        for completion in stage.completions
    ]


def _completion_records(record: dict[str, Any]) -> list[dict[str, Any]]:
    stages = (record["drafts"], *record["refinements"])
    return [completion for stage in stages for completion in stage["completions"]]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file: the whole of it or nothing (a temporary file is renamed)."""
    name = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with name.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
