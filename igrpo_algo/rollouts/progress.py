"""The progress of a rollout as a live line: prompts done, tokens per second, rewards."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from igrpo_kernels.checks import check_callable, check_count, describe

from ..fields import check_fields
from ..thinking import check_text
from .records import Stage

if TYPE_CHECKING:
    from rich.table import Table

DRAFTING, WAITING, REFINING = "drafting", "waiting", "refining"


@dataclass(frozen=True)
class StageStarted:
    """Sampling of a prompt's stage began.

    Attributes:
        index: Position of the prompt.
        number: 0 for drafts, 1 and up for the rounds of refinement.
        time: Seconds since the rollout began.
    """

    index: int
    number: int
    time: float

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class StageFinished:
    """A prompt's stage was sampled and scored, or passed over (its completions have no tokens).

    Attributes:
        index: Position of the prompt.
        number: 0 for drafts, 1 and up for the rounds of refinement.
        stage: The stage, with completions, rewards and times.
        last: Whether it was the prompt's last stage.
    """

    index: int
    number: int
    stage: Stage
    last: bool

    def __post_init__(self) -> None:
        check_fields(self)


class RolloutProgress:
    """A value for `on_progress`: counts what a rollout has done, and shows it in one line.

    `str(progress)` is the line, and `show_live(progress)` keeps it on the terminal. Completions
    count when their stage is done. Several rollouts may report to one value, one after the other.

    Args:
        total: Prompts to come. Those that a stream's journal holds already are never reported.
        sampler: If it counts `prompt_tokens` and `cached_tokens`, the line has the share of prompt
            tokens, from now on, that came from the engine's prefix cache.
        label: What `show_live` writes before the line.
        clock: Gives seconds.

    Attributes:
        done: Prompts that are through all their stages.
        tokens: Tokens drawn in finished stages.
        draft_rewards: Sum and number of the drafts' rewards, unscored ones left out.
        refinement_rewards: The same of all rounds of refinement.

    Raises:
        TypeError: `total` is not an int.
        ValueError: `total` is below 0.

    Examples:
        >>> from igrpo_algo import Completion, two_stage_rollout
        >>> def sampler(prompts, n, seed):
        ...     return [[Completion([i], str(i)) for i in range(n)] for _ in prompts]
        >>> def reward(prompts, completions):
        ...     return [float(c) for c in completions]
        >>> progress = RolloutProgress(1)
        >>> rollouts = two_stage_rollout(["q"], sampler, reward, on_progress=progress)
        >>> print(progress)
        1/1 done · ... tok/s · draft reward 1.50 · refinement reward 1.50
    """

    def __init__(
        self,
        total: int,
        *,
        sampler: object = None,
        label: str = "rollout",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = check_count("total", total, at_least=0)
        self.label = check_text("label", label)
        self.done = self.tokens = 0
        self.draft_rewards = self.refinement_rewards = (0.0, 0)
        self._sampler = sampler
        self._clock = check_callable("clock", clock)
        self._began = self._latest = math.nan
        self._stages: dict[int, str] = {}
        self._cache_before = self._cache_counts()

    def __call__(self, event: StageStarted | StageFinished) -> None:
        """Take note of an event."""
        self._latest = self._clock()
        if math.isnan(self._began):
            self._began = self._latest
        if isinstance(event, StageStarted):
            self._stages[event.index] = REFINING if event.number else DRAFTING
            return
        self.tokens += sum(len(c.token_ids) for c in event.stage.completions)
        scored = [reward for reward in event.stage.rewards if not math.isnan(reward)]
        name = "refinement_rewards" if event.number else "draft_rewards"
        before, number = getattr(self, name)
        setattr(self, name, (before + sum(scored), number + len(scored)))
        if event.last:
            self._stages.pop(event.index, None)
            self.done += 1
        else:
            self._stages[event.index] = WAITING

    def stage_counts(self) -> dict[str, int]:
        """Count the prompts that are drafting, waiting for their next stage, or refining."""
        counts = Counter(list(self._stages.values()))
        return {stage: counts[stage] for stage in (DRAFTING, WAITING, REFINING)}

    def tokens_per_second(self) -> float:
        """Tokens of finished stages over the time from the first event to the latest."""
        seconds = self._latest - self._began
        return self.tokens / seconds if seconds > 0 else 0.0

    def cached_share(self) -> float | None:
        """Share of prompt tokens served from the prefix cache; None where nothing is known."""
        prompt, cached = (
            now - then for now, then in zip(self._cache_counts(), self._cache_before, strict=True)
        )
        return cached / prompt if prompt > 0 else None

    def __str__(self) -> str:
        parts = [f"{self.done}/{self.total} done"]
        parts += [f"{count} {stage}" for stage, count in self.stage_counts().items() if count]
        parts.append(f"{self.tokens_per_second():,.0f} tok/s")
        drafted = self.draft_rewards[1] > 0
        for name, (total, number) in {
            "draft reward": self.draft_rewards,
            "refinement reward" if drafted else "reward": self.refinement_rewards,
        }.items():
            if number:
                parts.append(f"{name} {total / number:.2f}")
        if (cached := self.cached_share()) is not None:
            parts.append(f"{cached:.0%} of prompts cached")
        return " · ".join(parts)

    def _cache_counts(self) -> tuple[int, int]:
        names = ("prompt_tokens", "cached_tokens")
        prompt, cached = (getattr(self._sampler, name, 0) for name in names)
        return prompt, cached


@contextmanager
def show_live(*lines: RolloutProgress, console: Any = None) -> Iterator[None]:
    """Keep one line per `RolloutProgress` on the terminal for the length of the block.

    Without a terminal the last state is printed once, at the end.

    Args:
        lines: What is shown, one below the other.
        console: A `rich.console.Console`; None makes one on standard output, as wide as it is now.

    Yields:
        Nothing.

    Raises:
        TypeError: A line is not a `RolloutProgress`.
        ImportError: rich is not installed.

    Examples:
        >>> progress = RolloutProgress(0, label="nothing to do")
        >>> with show_live(progress):
        ...     pass
        nothing to do ... 0/0 done · 0 tok/s
    """
    from rich.console import Console
    from rich.live import Live

    for line in lines:
        if not isinstance(line, RolloutProgress):
            raise TypeError(f"lines must be RolloutProgress, got {describe(line)}")
    with Live(get_renderable=lambda: _table(lines), console=console or Console()):
        yield


def _table(lines: tuple[RolloutProgress, ...]) -> "Table":
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for line in lines:
        bar: Any = ProgressBar(line.total or 1, line.done if line.total else 1, width=20)
        table.add_row(line.label, bar, str(line))
    return table
