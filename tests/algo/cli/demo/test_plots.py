"""The picture of the demo shows the numbers of the metrics file."""

import struct

import pytest

from igrpo_algo.cli.demo.plots import COLORS, build_figure, curves_by_seed, mean_curve, save_figure
from igrpo_algo.cli.demo.runs import ARMS

LABELS = {"grpo": "GRPO, 8", "igrpo": "iGRPO, 4 + 4"}


def held_out(arm: str, seed: int, completions: int, accuracy: float) -> dict:
    position = {"arm": arm, "seed": seed, "split": "held-out", "completions": completions}
    return {**position, "accuracy": accuracy, "refined_accuracy": accuracy / 2}


def train(arm: str, seed: int, completions: int, reward: float, **more: float) -> dict:
    """A row of training, whose metrics of held-out problems are not drawn."""
    position = {"arm": arm, "seed": seed, "split": "train", "completions": completions}
    return {**position, "reward": reward, "zero_variance": 1 - reward, "accuracy": 99.0, **more}


ROWS = [
    held_out("grpo", 0, 0, 0.1),
    train("grpo", 0, 512, 0.2),
    held_out("grpo", 0, 1024, 0.5),
    held_out("grpo", 1, 0, 0.1),
    train("grpo", 1, 512, 0.4),
    held_out("grpo", 1, 1024, 0.7),
    held_out("igrpo", 0, 0, 0.1),
    train("igrpo", 0, 512, 0.6, copy_rate=0.25),
    held_out("igrpo", 0, 1024, 0.3),
    held_out("igrpo", 1, 0, 0.1),
    train("igrpo", 1, 512, 0.8, copy_rate=0.35),
]


def axes_of(title: str):
    figure = build_figure(ROWS, LABELS, "title")
    [axes] = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(title)]
    return axes


def thick_lines(axes) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_color(): [tuple(point) for point in line.get_xydata().tolist()]
        for line in axes.lines
        if line.get_linewidth() == 2
    }


def test_curves_are_kept_apart_by_arm_seed_split_and_metric() -> None:
    assert curves_by_seed(ROWS, "grpo", "train", "reward") == {0: [(512, 0.2)], 1: [(512, 0.4)]}
    assert curves_by_seed(ROWS, "grpo", "train", "copy_rate") == {}
    assert curves_by_seed(ROWS, "igrpo", "held-out", "accuracy") == {
        0: [(0, 0.1), (1024, 0.3)],
        1: [(0, 0.1)],
    }


def test_a_mean_needs_every_seed() -> None:
    curves = {0: [(0, 1.0), (8, 2.0)], 1: [(8, 4.0), (0, 3.0), (16, 9.0)]}
    assert mean_curve(curves) == [(0, 2.0), (8, 3.0)]
    assert mean_curve({}) == []


@pytest.mark.parametrize(
    ("title", "grpo", "igrpo"),
    [
        ("Right, single-shot", [(0, 0.1), (1024, 0.6)], [(0, 0.1)]),
        ("Right, draft and then refine", [(0, 0.05), (1024, 0.3)], [(0, 0.05)]),
        ("Groups without variance", [(512, 0.7)], [(512, 0.3)]),
        ("Refinements that copy", [], [(512, 0.3)]),
    ],
)
def test_each_panel_draws_the_mean_of_its_metric(title, grpo, igrpo) -> None:
    drawn = thick_lines(axes_of(title))
    for arm, points in (("grpo", grpo), ("igrpo", igrpo)):
        flat = [number for point in drawn.get(COLORS[arm], []) for number in point]
        assert flat == pytest.approx([number for point in points for number in point])


def test_every_seed_has_a_thin_line() -> None:
    thin = [line for line in axes_of("Right, single-shot").lines if line.get_linewidth() < 1]
    assert [line.get_color() for line in thin] == [COLORS[arm] for arm in LABELS for _ in range(2)]


def test_labels_units_and_legend_are_there() -> None:
    axes = axes_of("Right, single-shot")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(LABELS.values())
    figure = build_figure(ROWS, LABELS, "what it shows")
    assert {axes.get_xlabel() for axes in figure.axes} == {"completions sampled"}
    assert figure.get_suptitle() == "what it shows"
    assert axes.xaxis.get_major_formatter()(25600) == "25.6k"
    assert axes.yaxis.get_major_formatter()(0.5) == "50%"


def test_every_arm_has_a_color_of_its_own() -> None:
    assert set(COLORS) == set(ARMS)
    assert len(set(COLORS.values())) == len(COLORS)


def test_the_file_is_a_png_of_the_right_size_and_nothing_is_left_beside_it(tmp_path) -> None:
    path = tmp_path / "curves.png"
    save_figure(build_figure(ROWS, LABELS, "title"), path)
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1800, 990)
    assert list(tmp_path.iterdir()) == [path]


def test_arms_without_rows_are_left_out() -> None:
    figure = build_figure([], LABELS, "title")
    assert sum(len(axes.lines) for axes in figure.axes) == 0
