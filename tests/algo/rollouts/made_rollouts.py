"""Three prompts of a rollout, written by hand: one refined, one skipped, one without its draft."""

import math

from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.rollouts.journal import Header
from igrpo_algo.rollouts.records import DraftChoice, Rollout, Rollouts, Stage

NAN = math.nan
CHAT = [{"role": "user", "content": "große Frage\n"}]


def completion(*ids, reason="stop", known=True):
    return Completion(list(ids), str(ids), [-0.1 * i for i in ids] if known else None, reason)


FIRST = Rollout(
    index=0,
    drafts=Stage("q", [completion(1, 2), completion(3)], [0.0, 1.0], [6, 6], 0.0, 2.0),
    choices=[DraftChoice(1, 1.0, "(3,)", tokens_cut=4)],
    refinements=[
        Stage(
            "q (3,)",
            [completion(4), completion(5, 6, 7, reason="length")],
            [1.0, NAN],
            [6, 6, 3],
            started=2.0,
            ended=3.5,
        )
    ],
)
SKIPPED = Rollout(
    index=1,
    drafts=Stage(CHAT, [completion(known=False), completion(reason="cancelled")], [NAN, NAN]),
    choices=[DraftChoice(-1, NAN, failed=True, skipped=True)],
    refinements=[Stage(CHAT, [completion(reason="skipped")] * 2, [NAN, NAN], None, 1.0, 1.0)],
)
DROPPED = Rollout(
    index=2,
    drafts=Stage([7, 8], [completion(1), completion(2)], [0.25, 0.0]),
    choices=[DraftChoice(0, 0.25, failed=True, dropped=True)],
    refinements=[Stage([7, 8], [completion(9), completion(9)], [0.5, -1.0])],
)
ALL = Rollouts([FIRST, SKIPPED, DROPPED])
HEADER = Header.of(["q", CHAT, [7, 8]], 2, 2, 1, seed=5)
