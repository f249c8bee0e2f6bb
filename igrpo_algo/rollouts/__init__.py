"""Two-stage rollouts with any sampler and any reward, and their records.

`two_stage` has both forms: all prompts in step (`in_step`), or as a stream (`streamed`); what they
do to a prompt is in `one_prompt`. `sampling` says what a sampler is, `scoring` what a reward is,
`records` what is kept. `single_flight` serves trainers that ask once per sample.
"""

from .completions import Completion, pack_completions, pad_completions
from .progress import RolloutProgress, StageFinished, StageStarted, show_live
from .records import Rollout, Rollouts, Stage
from .sampling import AsyncSampler, Sampler, Samples, sample_group
from .scoring import RewardError
from .single_flight import SingleFlight
from .timeline import plot_rollout_timeline
from .two_stage import stream_two_stage_rollout, two_stage_rollout

__all__ = [
    "AsyncSampler",
    "Completion",
    "RewardError",
    "Rollout",
    "RolloutProgress",
    "Rollouts",
    "Sampler",
    "Samples",
    "SingleFlight",
    "Stage",
    "StageFinished",
    "StageStarted",
    "pack_completions",
    "pad_completions",
    "plot_rollout_timeline",
    "sample_group",
    "show_live",
    "stream_two_stage_rollout",
    "two_stage_rollout",
]
