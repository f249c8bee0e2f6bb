"""The functions that the tests name to slime, as an example's module would."""

from typing import Any

from slime.utils.types import Sample

from igrpo_algo import DraftRules, DraftTemplate, TextSplice
from igrpo_algo.trainers.slime import make_generate, make_loss
from igrpo_kernels import Cispo

RULES = DraftRules(splice=TextSplice(DraftTemplate("[", "]")))
generate = make_generate(rules=RULES, num_drafts=4)
loss = make_loss()
cispo = make_loss(Cispo.relative(1.0, 0.28))


async def letters(args: Any, sample: Sample) -> float:
    """Reward by the letters; the prompt is the original one in both stages."""
    assert sample.prompt[0]["content"] in ("1+1?", "2+2?")
    assert sample.label == "7"
    return float(sum(map(ord, sample.response)))


async def batched_letters(args: Any, samples: list[Sample]) -> list[float]:
    return [float(len(samples) + index) for index, _ in enumerate(samples)]
