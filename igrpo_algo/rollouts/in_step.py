"""All prompts go through each stage together: one call of the sampler, then one of the reward."""

from .one_prompt import OnePrompt
from .records import Rollout
from .sampling import sample_batch
from .setup import Setup, located


async def run_in_step(setup: Setup) -> list[Rollout]:
    """Take all prompts through their stages."""
    everyone = [OnePrompt(setup, index) for index in range(len(setup.prompts))]
    for number in range(setup.rounds + 1):
        await _run_stage(setup, number, everyone)
    return [one.rollout for one in everyone]


async def _run_stage(setup: Setup, number: int, everyone: list[OnePrompt]) -> None:
    asked = [(one, prompt) for one in everyone if (prompt := one.next_prompt()) is not None]
    if not asked:
        return
    drawing, prompts = [one for one, _ in asked], [prompt for _, prompt in asked]
    seeds = [setup.sampling_seed(one.index, number) for one in drawing]
    known = [seed for seed in seeds if seed is not None]
    started = [setup.report_start(one.index, number) for one in drawing]
    ended: dict[int, float] = {}

    def note_end(position: int) -> None:
        ended[position] = setup.clock()

    with located(f"stage {number}"):
        groups = await sample_batch(
            setup.sampler, prompts, setup.size(number), known or None, note_end
        )
    now = setup.clock()
    drawn = {one.index: group for one, group in zip(drawing, groups, strict=True)}
    scored = await setup.score(drawn)
    for position, one in enumerate(drawing):
        times = started[position], ended.get(position, now)
        one.finish_stage(drawn[one.index], *scored[one.index], *times)
