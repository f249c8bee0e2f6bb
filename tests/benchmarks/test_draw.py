"""The plot of a run: a bar for every case, to the left of 1 where ours is better."""

from pathlib import Path

import pytest
from made_runs import CASE, figure, run, run_of
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import cases, draw
from benchmarks.compare import rows


def test_the_bar_of_a_case() -> None:
    (row,) = rows(run())
    (bar,) = draw.bars(row)
    assert bar == draw.Bar(
        "linear_policy_loss, forward and backward",
        "T=2,048 H=768 V=32,768 bf16, 30% active",
        0.5,
        "20.0 : 40.0 ms, QuACK CE*",
        1.0,
        "1,024 : 1,024 MiB",
    )


def test_no_bar_without_a_peer_and_none_for_a_few_kilobytes() -> None:
    (alone,) = rows(run_of(figure("igrpo", 1.0)))
    assert draw.bars(alone) == []
    (tiny,) = rows(run_of(figure("igrpo", 1.0, peak_bytes=8), figure("TRL", 1.0, peak_bytes=2)))
    assert draw.bars(tiny)[0].memory is None


@pytest.mark.parametrize(
    ("ratio", "end", "text"), [(0.5, 0.5, "0.50"), (3.7, 3.7, "3.70"), (184.2, 4.0, "184")]
)
def test_bars_begin_at_one_and_end_within_the_panel(ratio: float, end: float, text: str) -> None:
    axes = Figure().subplots()
    draw.put(axes, 0, ratio, "note")
    (patch,) = axes.patches
    assert sorted((patch.get_x(), patch.get_x() + patch.get_width())) == sorted((1.0, end))
    assert [each.get_text() for each in axes.texts] == [text, "note"]
    draw.frame(axes, "title")
    low, high = axes.get_xlim()
    assert low < end < high


def test_no_two_labels_lie_over_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = [
        figure(peer, median, case)
        for case in cases.gpu_grid()
        for peer, median in (("igrpo", 20.0), ("torch linear CE", 1.0))
    ]
    kept: list[Figure] = []
    monkeypatch.setattr(draw, "save", lambda made, path: kept.append(made) or path)
    draw.draw(run_of(*figures), tmp_path / "plot.png")
    (made,) = kept
    made.set_dpi(90)
    made.draw_without_rendering()
    for axes in made.axes:
        labels = [label.get_window_extent() for label in axes.get_yticklabels()]
        labels += [text.get_window_extent() for text in axes.texts]
        labels += [label.get_window_extent() for label in axes.get_xticklabels()]
        for at, box in enumerate(labels):
            assert not any(box.overlaps(other) for other in labels[at + 1 :] if other.width)


def test_a_plot_is_small(tmp_path: Path) -> None:
    figures = [figure(peer, 2.0, case) for case in cases.gpu_grid() for peer in ("igrpo", "TRL")]
    path = draw.draw(run_of(*figures), tmp_path / "plots" / "run.png")
    assert path.stat().st_size < 120_000
    with Image.open(path) as image:
        assert image.width <= 1000


def test_cases_of_one_op_stand_under_its_name_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = [draw.Bar(group, f"{n}", 1.5) for n, group in enumerate(["a", "b", "a"])]
    kept: list[Figure] = []
    monkeypatch.setattr(draw, "save", lambda made, path: kept.append(made) or path)
    draw.draw_bars(bars, "title", tmp_path / "plot.png")
    labels = [label.get_text() for label in kept[0].axes[0].get_yticklabels()]
    assert labels == ["a", "0", "2", "b", "1"]


def test_the_case_of_the_tests_is_drawn(tmp_path: Path) -> None:
    assert draw.size(CASE) in [bar.label for row in rows(run()) for bar in draw.bars(row)]
