"""Two-stage rollouts with any sampler and any reward: stage by stage, or as a stream.

Stage 1: N drafts from q, scored; d* = argmax R. Stage 2: G refinements from q' = q + d*, scored by
the same reward on the original q. iGRPO: Hatamizadeh et al. 2026, arXiv:2602.09000.
"""

import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from igrpo_kernels.checks import check_count, check_number

from ..drafts.rules import DraftRules, Ties
from ..drafts.select import select_best_draft
from ..files import check_path
from ..prompts import Prompt
from .in_step import run_in_step
from .journal import check_journal
from .records import Rollout, Rollouts
from .sampling import AnySampler, run_blocking
from .scoring import Reward
from .setup import OnProgress, Setup
from .slots import Slots
from .streamed import run_stream


def two_stage_rollout(
    prompts: Sequence[Prompt],
    sampler: AnySampler,
    reward: Reward,
    *,
    num_drafts: int = 4,
    num_refinements: int = 4,
    rounds: int = 1,
    columns: Mapping[str, Sequence[Any]] | None = None,
    rules: DraftRules = DraftRules(),
    seed: int | None = None,
    on_progress: OnProgress | None = None,
) -> Rollouts:
    """Draw drafts, choose one, draw refinements; all prompts go through a stage together.

    d_i ~ pi(.|q), i = 1..N;  d* = argmax_i R(d_i);  q' = q + d*;  o_j ~ pi(.|q'), j = 1..G

    All drafts are drawn in one call of the sampler, then scored, then all refinements are drawn in
    one call. `stream_two_stage_rollout` gives the same groups without waiting in between: each
    prompt's stage has its own seed. The defaults are the paper's settings where it
    states them; what it leaves open (ties, failures, thinking, length, template) is an argument.
    iGRPO: Hatamizadeh et al. 2026, arXiv:2602.09000, equations 2 and 3, algorithm 1.

    Args:
        prompts: P strings, lists of chat messages, or lists of token ids; none give an empty
            result.
        sampler: What draws completions. See `igrpo_algo.rollouts.sampling` for its forms.
        reward: TRL's convention: `reward(prompts=..., completions=..., **columns)` returns a float
            or None (not scored) for each completion; a coroutine function may too. It is called
            once per stage (streamed: once per prompt and stage), and sees the original prompts.
        num_drafts: N. 0 leaves Stage 1 out: whatever the rules, the group is then GRPO's, unless
            there is another round.
        num_refinements: G, at least 1.
        rounds: Rounds of refinement. Each chooses among all completions so far, so the best so
            far becomes the draft, and it is spliced into the original prompt.
        columns: Lists of P values that the reward is given by name, repeated per completion.
        rules: Which draft Stage 2 sees, and how it gets into the prompt. A splice is tried with an
            empty draft on each prompt before sampling starts, so what it refuses, it refuses then.
        seed: Fixes the samples (each prompt and stage has a seed of its own), dropout and random
            selection. None draws fresh ones.
        on_progress: Called with each `StageStarted` and `StageFinished`.

    Returns:
        The groups of all prompts, prompt-major.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A count is out of range, options contradict each other or have no effect, or
            sampler or reward returned another number of values than asked for.
        RewardError: The reward raised; the message names the prompt.

    Examples:
        >>> from igrpo_algo import Completion
        >>> def sampler(prompts, n, seed):
        ...     return [[Completion([i], str(i)) for i in range(n)] for _ in prompts]
        >>> def reward(prompts, completions, answer):
        ...     return [float(c == a) for c, a in zip(completions, answer)]
        >>> rollouts = two_stage_rollout(["1 + 1?"], sampler, reward, columns={"answer": ["2"]})
        >>> rollouts.draft_rewards, rollouts.chosen
        (tensor([[0., 0., 1., 0.]]), tensor([2]))
    """
    setup = Setup(
        prompts, sampler, reward, num_drafts=num_drafts, num_refinements=num_refinements,
        rounds=rounds, columns=columns, rules=rules, seed=seed, on_progress=on_progress,
    )  # fmt: skip
    return Rollouts(run_blocking(run_in_step(setup)))


def stream_two_stage_rollout(  # noqa: D417  # the docstring names where the others stand
    prompts: Sequence[Prompt],
    sampler: AnySampler,
    reward: Reward,
    *,
    num_drafts: int = 4,
    num_refinements: int = 4,
    rounds: int = 1,
    columns: Mapping[str, Sequence[Any]] | None = None,
    rules: DraftRules = DraftRules(),
    seed: int | None = None,
    on_progress: OnProgress | None = None,
    concurrency: int = 256,
    reward_max: float | None = None,
    journal: str | os.PathLike[str] | None = None,
) -> AsyncGenerator[Rollout, None]:
    """Yield each prompt's group as soon as it is done; no prompt waits for another's stage.

    Each prompt goes drafts, score, choose, splice, refine on its own. Whenever slots are free, a
    waiting Stage-1 request gets them before a waiting Stage-2 one: the longest completions then
    start early, and the wall time is nearly that of one stage. `Rollouts.of` sorts the groups.

    A stream that is closed (`aclose`, best through `contextlib.aclosing`), cancelled or failed
    cancels its requests and waits until they are gone; what had finished by then is in the
    journal. A sampler without `sample_one` runs in threads; a call that has begun there cannot be
    cancelled and only its result is dropped. A reward that is not a coroutine function runs in the
    event loop.

    Early selection (`reward_max`): drafts are requested one by one, the first to reach the maximum
    is an argmax, so Stage 2 starts at once and the prompt's unfinished drafts are cancelled. First
    drafts of all prompts go before second ones, which may then never be needed. What this changes:
    ties go to the draft that finishes first, so to shorter ones; the reward is called with one
    draft at a time; and Stage-1 statistics are censored. A cancelled draft has no tokens, a reward
    of NaN and the finish reason "cancelled"; `Rollouts.cancelled` counts them.

    Takes all arguments of `two_stage_rollout`, and these:

    Args:
        concurrency: Maximum number of completions asked of the sampler at a time. One request asks
            for all N or G of a prompt. If the sampler has `stream_one`, each completion holds its
            slot until it is done, and the engine's own number of slots, plus a few, keeps the
            engine full; otherwise all of them wait for the longest, and twice that number is
            better.
        reward_max: The reward's known maximum, for early selection; None waits for all drafts.
        journal: A file that gets each finished group before it is yielded. Groups that it already
            holds are yielded first and not drawn again, so a run that died can continue. Its first
            line has sizes, seed and a hash of the prompts, which must be the same then; functions
            cannot be compared.

    Returns:
        An asynchronous generator of groups, in the order in which they finish.

    Raises:
        TypeError: As in `two_stage_rollout`; a prompt cannot be written to the journal.
        ValueError: As there; the journal belongs to other prompts, sizes or seed; a reward exceeds
            `reward_max`; early selection meets another rule of choice.
        RewardError: The reward raised; the message names the prompt.

    Examples:
        >>> import asyncio
        >>> from igrpo_algo import Completion
        >>> async def sampler(prompts, n, seed):
        ...     return [[Completion([i], str(i)) for i in range(n)] for _ in prompts]
        >>> def reward(prompts, completions, answer):
        ...     return [float(c == a) for c, a in zip(completions, answer)]
        >>> async def collect():
        ...     stream = stream_two_stage_rollout(
        ...         ["1 + 1?", "1 + 2?"], sampler, reward, columns={"answer": ["2", "3"]}
        ...     )
        ...     return Rollouts.of([group async for group in stream])
        >>> asyncio.run(collect()).chosen
        tensor([2, 3])
    """
    setup = Setup(
        prompts, sampler, reward, num_drafts=num_drafts, num_refinements=num_refinements,
        rounds=rounds, columns=columns, rules=rules, seed=seed, on_progress=on_progress,
    )  # fmt: skip
    slots = Slots(check_count("concurrency", concurrency))
    if reward_max is not None:
        check_number("reward_max", reward_max)
        chosen_by = (rules.select, rules.selection_score, rules.ties)
        if chosen_by != (select_best_draft, None, Ties.FIRST):
            raise ValueError(
                "reward_max needs rules that take the first best draft by reward: "
                "select_best_draft, no selection_score, and Ties.FIRST"
            )
        if num_drafts == 0:
            raise ValueError("reward_max has no effect with num_drafts = 0")
    if journal is not None:
        check_journal(check_path("journal", journal), setup.header)
    return run_stream(setup, slots, reward_max, journal)
