"""TRL's reward functions as the reward of a streamed rollout, each function's values kept."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from trl.data_utils import apply_chat_template

from ...advantages.of_groups import sum_rewards
from ...rollouts.records import Rollout

NOT_COLUMNS = ("prompt", "completion", "completion_ids")


class Scored(NamedTuple):
    """One completion's rewards by function, and what the functions logged about it."""

    rewards: list[float]
    extra: dict[str, Any]


class StreamedRewards:
    """Scores completions as `GRPOTrainer._calculate_rewards` does, some prompts at a time.

    TRL's own waits for all ranks; this one is called whenever a prompt's stage is drawn. It asks
    for the column `row`, the index of the prompt in `rows`.

    Args:
        functions: Name, function or model, and tokenizer of each reward.
        weights: Weight of each. Shape [K].
        rows: Row of the data set of each prompt.
        chat_template_kwargs: What the chat template of a reward model is given.
        extras: What each function is given besides the columns: `trainer_state` and the like.
    """

    wants_completion_ids = True

    def __init__(
        self,
        functions: Iterable[tuple[str, Any, Any]],
        weights: Tensor,
        rows: list[dict[str, Any]],
        chat_template_kwargs: dict[str, Any],
        **extras: Any,
    ) -> None:
        self.functions = list(functions)
        self.weights = weights.cpu()
        self.rows = rows
        self.chat_template_kwargs = chat_template_kwargs
        self.extras = extras
        self._scored: dict[tuple[int, tuple[int, ...]], list[Scored]] = {}

    async def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        row: list[int],
    ) -> list[float]:
        """Return the weighted sums, NaN where no function had a value."""
        logged: dict[str, list[Any]] = {}

        def log_extra(column: str, values: list[Any]) -> None:
            logged.setdefault(column, []).extend(values)

        rows = [self.rows[index] for index in row]
        names = [name for name in rows[0] if name not in NOT_COLUMNS]
        columns = {name: [each[name] for each in rows] for name in names} | self.extras
        columns |= {"completion_ids": completion_ids, "log_extra": log_extra}
        by_function = [
            await self._call(*function, prompts, completions, columns)
            for function in self.functions
        ]
        for column, values in logged.items():
            if len(values) != len(row):
                raise ValueError(
                    f"log_extra({column!r}, ...) must be given one value per completion: "
                    f"{len(values)} values for {len(row)} completions"
                )
        for place, (index, ids) in enumerate(zip(row, completion_ids, strict=True)):
            extra = {column: values[place] for column, values in logged.items()}
            scored = Scored([values[place] for values in by_function], extra)
            self._scored.setdefault((index, tuple(ids)), []).append(scored)
        return sum_rewards(torch.tensor(by_function).T, self.weights).tolist()

    async def _call(
        self,
        name: str,
        function: Any,
        tokenizer: Any,
        prompts: list[Any],
        completions: list[Any],
        columns: dict[str, Any],
    ) -> list[float]:
        if isinstance(function, nn.Module):
            return self._ask_model(function, tokenizer, prompts, completions)
        values = function(prompts=prompts, completions=completions, **columns)
        if inspect.isawaitable(values):
            values = await values
        if len(values) != len(prompts):
            raise ValueError(
                f"The reward function {name!r} returned {len(values)} rewards, but {len(prompts)} "
                "were expected"
            )
        return [float("nan") if value is None else float(value) for value in values]

    @torch.inference_mode()
    def _ask_model(
        self, model: Any, tokenizer: Any, prompts: list[Any], completions: list[Any]
    ) -> list[float]:
        pairs = zip(prompts, completions, strict=True)
        if isinstance(prompts[0], str):
            texts = [prompt + completion for prompt, completion in pairs]
        else:
            chats = [{"messages": prompt + completion} for prompt, completion in pairs]
            kwargs = self.chat_template_kwargs
            texts = [apply_chat_template(chat, tokenizer, **kwargs)["text"] for chat in chats]
        inputs = tokenizer(
            text=texts,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            add_special_tokens=False,
        )
        device = next(model.parameters()).device
        scores: list[float] = model(**inputs.to(device)).logits[:, 0].tolist()
        return scores

    def of(self, rollout: Rollout) -> list[list[Scored]]:
        """Return the scores of each completion of each stage of a prompt."""
        left = {key: list(found) for key, found in self._scored.items()}
        nothing = Scored([float("nan")] * len(self.functions), {})

        def find(ids: list[int]) -> Scored:
            found = left.get((rollout.index, tuple(ids)))
            return found.pop(0) if found else nothing  # in the order in which they were scored

        return [[find(each.token_ids) for each in stage.completions] for stage in rollout.stages]

    def column(self, number: int) -> Callable[..., list[float]]:
        """Make a selection score out of one of the reward functions."""

        def score(completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float]:
            keys = zip(row, map(tuple, completion_ids), strict=True)
            return [self._scored[key][-1].rewards[number] for key in keys]

        score.wants_completion_ids = True  # type: ignore[attr-defined]
        return score
