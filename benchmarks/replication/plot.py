"""The map in one picture: every arm's difference to GRPO, and another for the ladder of sizes."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.draw import save
from benchmarks.replication import compare
from benchmarks.replication.arms import ARMS, baseline_of
from benchmarks.replication.compare import ByArm, Verdict, difference, verdict_on
from benchmarks.replication.ladder import FOLLOWED, Rungs
from benchmarks.replication.tables import MEASURES

COLORS = {
    Verdict.AHEAD: "#009E73",
    Verdict.LEVEL: "#0072B2",
    Verdict.BEHIND: "#D55E00",
    Verdict.OPEN: "0.55",
}
ARM_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
LINE = 0.24  # inches


def draw(maps: Mapping[str, ByArm], path: Path) -> None:
    """Draw the map into a PNG; of a ladder of sizes, the first rung."""
    places = list(compare.first_rung(maps))
    arms = [
        arm
        for arm in ARMS
        if arm != baseline_of(arm)
        and any(compare.is_compared(maps[place], arm, baseline_of(arm)) for place in places)
    ]
    figure = Figure(figsize=(3 + 2.2 * 2 * max(1, len(places)), 1.4 + LINE * len(arms)), dpi=150)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(1, 2 * max(1, len(places)), sharey=True, squeeze=False)[0]
    panels = [(place, measure) for place in places for measure in MEASURES]
    for axes, (place, measure) in zip(grid, panels, strict=False):
        axes.set_title(f"{place}\n{measure}", fontsize=9)
        _draw_panel(axes, maps[place], arms, measure)
    grid[0].set_yticks(range(len(arms)), [ARMS[arm].label for arm in arms], fontsize=8)
    grid[0].invert_yaxis()
    figure.suptitle(
        "Accuracy less GRPO's at equal completions, in points, with 95 % intervals over seeds: "
        "green ahead, orange behind, blue level (within the band), grey open",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    save(figure, path)


def _draw_panel(axes: Axes, arms: ByArm, names: list[str], measure: str) -> None:
    axes.axvspan(-100 * compare.LEVEL, 100 * compare.LEVEL, color="0.93", linewidth=0)
    axes.axvline(0, color="0.4", linewidth=0.8)
    for row, arm in enumerate(names):
        if not compare.is_compared(arms, arm, baseline_of(arm)):
            continue
        gap = difference(arms, arm, baseline_of(arm), MEASURES[measure])
        color = COLORS[verdict_on(arms, arm, baseline_of(arm), MEASURES[measure])]
        axes.plot([100 * gap.low, 100 * gap.high], [row, row], color=color, linewidth=2)
        axes.plot(100 * gap.mean, row, "o", color=color, markersize=4)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=8, left=False)


def draw_ladder(rungs: Rungs, path: Path) -> None:
    """Draw the difference to GRPO of a few arms against the size of the model into a PNG."""
    figure = Figure(figsize=(2 + 3.2 * len(rungs), 6), dpi=150)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(MEASURES), len(rungs), sharey=True, squeeze=False)
    for line, measure in zip(grid, MEASURES, strict=True):
        line[0].set_ylabel(f"{measure}, points", fontsize=9)
        for axes, (task, sizes) in zip(line, rungs.items(), strict=True):
            axes.set_title(task, fontsize=9)
            _draw_rungs(axes, sizes, measure)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(
        "Accuracy less GRPO's of the same size, with 95 % intervals over seeds",
        fontsize=10, x=0.01, ha="left",
    )  # fmt: skip
    save(figure, path)


def _draw_rungs(axes: Axes, sizes: Mapping[str, ByArm], measure: str) -> None:
    axes.axhspan(-100 * compare.LEVEL, 100 * compare.LEVEL, color="0.93", linewidth=0)
    axes.axhline(0, color="0.4", linewidth=0.8)
    for number, (arm, color) in enumerate(zip(FOLLOWED, ARM_COLORS, strict=True)):
        gaps = [
            difference(arms, arm, baseline_of(arm), MEASURES[measure]) for arms in sizes.values()
        ]
        beside = [rung + 0.08 * (number - (len(FOLLOWED) - 1) / 2) for rung in range(len(sizes))]
        means = [100 * gap.mean for gap in gaps]
        reach = [100 * (gap.high - gap.mean) for gap in gaps]
        look = {"color": color, "marker": "o", "markersize": 4, "label": ARMS[arm].label}
        axes.errorbar(beside, means, reach, **look)
    axes.set_xticks(range(len(sizes)), list(sizes))
    axes.set_xlim(-0.4, len(sizes) - 0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
