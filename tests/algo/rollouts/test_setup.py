"""What a rollout refuses before anything is drawn."""

import math

import pytest
from canned_rollouts import by_text, listed

from igrpo_algo.drafts.rules import DraftRules, Ties
from igrpo_algo.drafts.select import select_worst_draft
from igrpo_algo.drafts.splice import TokenSplice
from igrpo_algo.rollouts.two_stage import stream_two_stage_rollout, two_stage_rollout


@pytest.mark.parametrize("run", [two_stage_rollout, stream_two_stage_rollout])
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_drafts": -1}, ValueError, "num_drafts must be >= 0, got -1"),
        ({"num_refinements": 0}, ValueError, "num_refinements must be >= 1, got 0"),
        ({"rounds": 0}, ValueError, "rounds must be >= 1, got 0"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"rules": "best"}, TypeError, "rules must be DraftRules, got str 'best'"),
        ({"on_progress": 1}, TypeError, "on_progress must be callable, got int 1"),
        ({"columns": {"answer": ["1"]}}, ValueError, "1 values for 2 prompts"),
        ({"rules": DraftRules(splice=TokenSplice())}, TypeError, "pass splice=TextSplice"),
    ],
)
def test_wrong_options(run, options, error, match):
    with pytest.raises(error, match=match):
        run(["a", "b"], listed(), by_text, **options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"concurrency": 0}, ValueError, "concurrency must be >= 1, got 0"),
        ({"reward_max": math.inf}, ValueError, "reward_max must be finite"),
        ({"reward_max": 1, "num_drafts": 0}, ValueError, "reward_max has no effect"),
        *(
            ({"reward_max": 1, "rules": rules}, ValueError, "reward_max needs rules that take")
            for rules in (
                DraftRules(ties=Ties.SHORTEST),
                DraftRules(selection_score=by_text),
                DraftRules(select_worst_draft),
            )
        ),
    ],
)
def test_wrong_options_of_the_stream(options, error, match):
    with pytest.raises(error, match=match):
        stream_two_stage_rollout(["a", "b"], listed(), by_text, **options)


def test_a_prompt_that_cannot_take_a_draft_is_named_before_sampling():
    with pytest.raises(TypeError, match="pass splice=TokenSplice") as error:
        two_stage_rollout(["a", [1, 2]], listed(), by_text)
    assert error.value.__notes__ == ["at prompts[1], before sampling"]
    with pytest.raises(ValueError, match="user message"):
        two_stage_rollout([[{"role": "system", "content": "s"}]], listed(), by_text)
