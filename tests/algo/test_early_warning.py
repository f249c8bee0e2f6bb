"""What is warned of, when, and that it is said once."""

import math

import pytest

from igrpo_algo.early_warning import EarlyWarning

HEALTHY = {
    "copied": 0.1,
    "refinement_zero_std": 0.3,
    "draft_zero_std": 0.3,
    "right_after_right_draft": 0.9,
    "right_after_wrong_draft": 0.3,
    "draft_reward": 0.5,
    "uplift": 0.1,
}


def said(*batches: dict[str, float], window: int = 4) -> list[list[str]]:
    watch = EarlyWarning(window)
    return [watch.see(HEALTHY | batch) for batch in batches]


def test_a_healthy_run_is_left_alone() -> None:
    assert said(*[{}] * 30) == [[]] * 30


@pytest.mark.parametrize(
    ("batch", "after", "number", "option"),
    [
        ({"copied": 0.625}, 0, "62%", "draft_loss_coef"),
        ({"refinement_zero_std": 0.95}, 3, "95%", "draft_loss_coef=1"),
        (
            {"right_after_right_draft": 1.0, "right_after_wrong_draft": 0.0},
            3,
            "100% after a right draft and in 0%",
            "draft_dropout",
        ),
        ({"uplift": -0.3}, 3, "0.3 (+- 0) below the drafts' 0.5", "draft_template"),
    ],
)
def test_each_is_said_once_with_its_number_and_the_way_out(
    batch: dict[str, float], after: int, number: str, option: str
) -> None:
    messages = said(*[batch] * 12)
    assert [len(each) for each in messages] == [int(i == after) for i in range(12)]
    assert number in messages[after][0]
    assert option in messages[after][0]


def test_equal_groups_of_both_stages_are_the_tasks_doing() -> None:
    assert not any(said(*[{"refinement_zero_std": 1.0, "draft_zero_std": 0.95}] * 8))


def test_half_are_not_more_than_half() -> None:
    assert not any(said({"copied": 0.5}))


def test_a_negative_uplift_counts_at_the_start_alone() -> None:
    later = [{"uplift": 0.2}] * 4 + [{"uplift": -0.4}] * 8
    assert not any(said(*later))


def test_a_forgotten_question_is_said_once_with_its_number_and_the_way_out() -> None:
    falling = [{"draft_reward": value} for value in (0.3, 0.3, 0.3, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1)]
    messages = said(*falling)
    assert [len(each) for each in messages] == [0] * 7 + [1, 0]
    assert "0.1 in the last 4 batches and 0.3 (+- 0) in the first" in messages[7][0]
    assert "draft_loss_coef=1" in messages[7][0]


@pytest.mark.parametrize(
    "rewards",
    [
        (0.3,) * 4 + (0.21,) * 8,
        (0.1,) * 4 + (0.3,) * 8,
        (1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0),
        (math.inf, -math.inf) * 2 + (0.3,) * 8,
    ],
    ids=["a_small_fall", "a_rise", "a_fall_within_its_noise", "infinite"],
)
def test_what_is_not_forgotten(rewards: tuple[float, ...]) -> None:
    assert not any(said(*[{"draft_reward": value} for value in rewards]))


def test_an_uplift_within_its_noise_is_not_warned_of() -> None:
    noisy = [{"uplift": value} for value in (-0.9, 0.3, -0.9, 0.1)]
    assert not any(said(*noisy))


def test_a_worst_draft_costs_something_and_breaks_nothing() -> None:
    assert not any(said(*[{"uplift": -0.2}] * 8))


def test_where_no_draft_is_shown_the_template_is_not_to_blame() -> None:
    assert not any(said(*[{"uplift": -0.4, "copied": math.nan}] * 8))


def test_a_few_equal_groups_by_chance_are_not_warned_of() -> None:
    gaps = [{"refinement_zero_std": 1.0, "draft_zero_std": of} for of in (0.0, 1.0, 1.0, 0.5)]
    assert not any(said(*gaps))


def test_batches_without_a_number_are_left_out() -> None:
    unknown = {"refinement_zero_std": math.nan}
    messages = said(*[{"refinement_zero_std": 1.0}, unknown] * 4)
    assert [bool(each) for each in messages] == [False] * 6 + [True, False]
    assert EarlyWarning(1).see({}) == []


@pytest.mark.parametrize(("window", "error"), [(0, ValueError), (2.5, TypeError)])
def test_a_window_is_a_count(window: float, error: type[Exception]) -> None:
    with pytest.raises(error, match="window must be"):
        EarlyWarning(window=window)


@pytest.mark.parametrize("value", ["0.5", None, [0.5]])
def test_a_metric_that_is_no_number_is_named(value) -> None:
    with pytest.raises(TypeError, match=r"metrics\['copied'\] must be a number, got"):
        EarlyWarning().see({"copied": value})
