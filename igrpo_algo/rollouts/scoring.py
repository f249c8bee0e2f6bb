"""Call a reward function by TRL's convention, and get one float per completion.

reward(prompts=[...], completions=[...], **columns) -> list of float or None

The three kinds of list are of equal length, one entry per completion. As in TRL, a completion is
a string, or, where its prompt is a list of chat messages, a list of one assistant message.
The function may be a coroutine function. None and NaN both mean "could not be scored". If it has a
true attribute `wants_completion_ids`, it gets the tokens too, as `completion_ids`.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from igrpo_kernels.checks import LARGEST_FLOAT32, check_callable, check_list, describe

from ..prompts import Prompt, copy_prompt
from .completions import Completion

Reward = Callable[..., Any]

NO_LISTS = (str, bytes, Mapping, Set)
"""Types whose items are not scores in the order of the completions."""


class RewardError(RuntimeError):
    """A reward function raised; the message names the prompt, and the cause is chained.

    Examples:
        >>> from igrpo_algo import Completion, two_stage_rollout
        >>> def sampler(prompts, n, seed):
        ...     return [[Completion([i], str(i)) for i in range(n)] for _ in prompts]
        >>> two_stage_rollout(["q"], sampler, lambda prompts, completions: 1 / 0)
        Traceback (most recent call last):
        igrpo_algo.rollouts.scoring.RewardError: reward failed on prompt 0 ('q'): Zero...
    """


@dataclass(frozen=True)
class Scorer:
    """A reward function with the columns that belong to the prompts.

    The function gets copies of the original prompts, never spliced ones, and may change them.

    Attributes:
        reward: The reward function.
        prompts: The P original prompts.
        columns: What else the function is given by name: P values each, repeated per completion.
        name: What errors call the function.

    Raises:
        TypeError: `reward` cannot be called, or a column is not a list.
        ValueError: A column does not hold P values, or has a name that is taken.
    """

    reward: Reward
    prompts: Sequence[Prompt]
    columns: Mapping[str, Sequence[Any]]
    name: str = "reward"

    def __post_init__(self) -> None:
        check_callable(self.name, self.reward)
        taken = {"prompts", "completions", *(["completion_ids"] if self._wants_ids else [])}
        for column, values in self.columns.items():
            if column in taken:
                raise ValueError(f"columns must not be named {column!r}: the name is taken")
            if len(check_list(f"columns[{column!r}]", values)) != len(self.prompts):
                raise ValueError(
                    f"columns[{column!r}] must hold one value per prompt: {len(values)} values "
                    f"for {len(self.prompts)} prompts"
                )

    @property
    def _wants_ids(self) -> bool:
        return bool(getattr(self.reward, "wants_completion_ids", False))

    async def __call__(self, index: int, completions: Sequence[Completion]) -> list[float]:
        """Score completions of one prompt. See `score`."""
        return (await self.score({index: completions}))[index]

    async def score(self, drawn: Mapping[int, Sequence[Completion]]) -> dict[int, list[float]]:
        """Score completions of many prompts, by index, in one call; NaN where there is no score.

        If the call fails, the prompts are scored one by one, to find the one at fault.

        Raises:
            RewardError: The function raised.
            ConnectionError: What the function asked (an engine, a judge) is out of reach; no
                prompt is at fault.
            TypeError: The function did not return a list, or a value is not a number.
            ValueError: The function returned another number of values, or an infinite one.
        """
        asked = {index: completions for index, completions in drawn.items() if completions}
        scores: dict[int, list[float]] = {index: [] for index in drawn}
        try:
            return scores | await self._ask(asked)
        except ConnectionError:
            raise
        except Exception:
            if len(asked) > 1:
                for index, completions in asked.items():
                    await self._ask({index: completions})
            raise

    async def _ask(self, drawn: Mapping[int, Sequence[Completion]]) -> dict[int, list[float]]:
        if not drawn:
            return {}
        owners = [index for index, completions in drawn.items() for _ in completions]
        prompts = [copy_prompt(self.prompts[index]) for index in owners]
        flat = [completion for completions in drawn.values() for completion in completions]
        answers = [_as_in_trl(p, c.text) for p, c in zip(prompts, flat, strict=True)]
        columns = {name: [rows[index] for index in owners] for name, rows in self.columns.items()}
        if self._wants_ids:
            columns["completion_ids"] = [completion.token_ids for completion in flat]
        where = self._where(*drawn)
        try:
            values = self.reward(prompts=prompts, completions=answers, **columns)
            if inspect.isawaitable(values):
                values = await values
            if isinstance(values, Iterable) and not isinstance(values, NO_LISTS):
                values = list(values)
        except ConnectionError:
            raise
        except Exception as error:
            raise RewardError(f"{self.name} failed on {where}: {error!r}") from error
        if not isinstance(values, list):
            raise TypeError(
                f"{self.name} must return a list of numbers, got {describe(values)} on {where}"
            )
        if len(values) != len(flat):
            raise ValueError(
                f"{self.name} must return one value per completion: {len(values)} values for "
                f"{len(flat)} completions of {where}"
            )
        scores: dict[int, list[float]] = {index: [] for index in drawn}
        for index, value in zip(owners, values, strict=True):
            scores[index].append(self._number(index, value))
        return scores

    def _number(self, index: int, value: Any) -> float:
        if value is None:
            return math.nan
        try:
            if isinstance(value, str | bytes):
                raise TypeError("text, which float() would read")
            number = float(value)
        except OverflowError:
            number = math.inf
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{self.name} must return numbers or None, got {describe(value)} "
                f"on {self._where(index)}"
            ) from error
        if abs(number) > LARGEST_FLOAT32:
            raise ValueError(
                f"{self.name} must be finite in float32, or None or NaN for what cannot be scored, "
                f"got {describe(value)} on {self._where(index)}"
            )
        return math.nan if math.isnan(number) else number

    def _where(self, *indices: int) -> str:
        if len(indices) > 1:
            return f"{len(indices)} prompts together, and on none of them alone"
        text = str(self.prompts[indices[0]])
        return f"prompt {indices[0]} ({text[:60]!r}{'...' if len(text) > 60 else ''})"


def _as_in_trl(prompt: Prompt, text: str) -> str | list[dict[str, str]]:
    is_chat = not isinstance(prompt, str) and isinstance(prompt[0], Mapping)
    return [{"role": "assistant", "content": text}] if is_chat else text
