"""The picture of a rollout: each prompt's row, where its bars begin and end, what is left blank."""

import xml.etree.ElementTree as ET

import pytest

from igrpo_algo import Completion, Rollouts
from igrpo_algo.rollouts.records import DraftChoice, Rollout, Stage
from igrpo_algo.rollouts.timeline import COLORS, plot_rollout_timeline, stage_spans

DRAWN, SKIPPED = [Completion([1], "a")], [Completion([], "", [], "skipped")]


def group(index, *times, skipped=()):
    """Make a group of one draft and one refinement per round, from (start, end) of each stage."""
    stages = [
        Stage("q", SKIPPED if number in skipped else DRAWN, [0.0], None, start, end)
        for number, (start, end) in enumerate(times)
    ]
    return Rollout(index, stages[0], [DraftChoice(0, 0.0)] * (len(stages) - 1), stages[1:])


BARRIER = Rollouts([group(0, (0, 1), (4, 5)), group(1, (0, 4), (4, 6)), group(2, (0, 2), (4, 9))])


def bars(figure):
    """Give (row, start, end) of each bar, by the name in the legend."""
    (axes,) = figure.axes
    return {
        bar.get_label(): [
            (round(box.get_y() + box.get_height() / 2), box.get_x(), box.get_x() + box.get_width())
            for box in bar
        ]
        for bar in axes.containers
    }


def test_bars_begin_and_end_with_their_stages():
    drawn = bars(plot_rollout_timeline(BARRIER))
    assert drawn == {
        "drafts": [(0, 0, 1), (1, 0, 4), (2, 0, 2)],
        "waiting": [(0, 1, 4), (2, 2, 4)],
        "refinements": [(0, 4, 5), (1, 4, 6), (2, 4, 9)],
    }


def test_a_barrier_is_one_vertical_line_and_a_stream_is_not():
    stream = Rollouts([group(0, (0, 1), (1, 2)), group(1, (0, 4), (4, 6))])
    for rollouts, wanted in ((BARRIER, {4}), (stream, {1, 4})):
        drawn = bars(plot_rollout_timeline(rollouts))
        assert {start for _, start, _ in drawn["refinements"]} == wanted
        assert bool(drawn["waiting"]) == (rollouts is BARRIER)


def test_rows_are_sorted_by_start_then_by_end_and_the_first_is_on_top():
    late, long, short = group(0, (2, 3), (3, 4)), group(1, (0, 5), (5, 6)), group(2, (0, 1), (1, 2))
    figure = plot_rollout_timeline(Rollouts([late, long, short]))
    assert bars(figure)["drafts"] == [(0, 0, 1), (1, 0, 5), (2, 2, 3)]
    bottom, top = figure.axes[0].get_ylim()
    assert (bottom, top) == (2.5, -0.5)


def test_later_rounds_have_names_and_colors_of_their_own():
    figure = plot_rollout_timeline(Rollouts([group(0, (0, 1), (1, 2), (3, 5))]))
    assert bars(figure)["refinements, round 2"] == [(0, 3, 5)]
    assert bars(figure)["waiting"] == [(0, 2, 3)]
    faces = {bar.get_label(): bar[0].get_facecolor() for bar in figure.axes[0].containers}
    assert len(set(faces.values())) == len(faces) == 4


def test_what_drew_nothing_is_blank():
    skipped = group(0, (0, 1), (4, 4), skipped=(1,))
    assert [span.kind for span in stage_spans(skipped)] == ["drafts"]
    no_drafts = Rollout(
        0,
        Stage("q", [], [], None, 3, 3),
        [DraftChoice(-1, 0.0)],
        [Stage("q", DRAWN, [0], None, 5, 6)],
    )
    assert list(stage_spans(no_drafts)) == [("refinements", 5, 6)]


def test_legend_labels_and_title_are_there():
    figure = plot_rollout_timeline(BARRIER, title="A barrier")
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(COLORS)
    assert axes.get_title(loc="left") == "A barrier"
    assert axes.get_xlabel() == "seconds since the rollout began"
    assert axes.get_xlim()[0] == 0


def test_the_ending_says_the_format_and_nothing_is_left_beside_the_file(tmp_path):
    plot_rollout_timeline(BARRIER, tmp_path / "line.png")
    plot_rollout_timeline(BARRIER, str(tmp_path / "line.svg"), title="In words")
    assert (tmp_path / "line.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert ET.parse(tmp_path / "line.svg").getroot().tag.endswith("svg")
    with pytest.raises(ValueError, match="Format 'txt' is not supported"):
        plot_rollout_timeline(BARRIER, tmp_path / "line.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["line.png", "line.svg"]


def test_nothing_to_draw_and_no_rollouts_are_refused():
    with pytest.raises(ValueError, match="must hold a stage with completions"):
        plot_rollout_timeline(Rollouts([]))
    with pytest.raises(TypeError, match="rollouts must be Rollouts, got list"):
        plot_rollout_timeline(BARRIER.rollouts)
