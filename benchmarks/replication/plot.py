"""The map in one picture: every arm's difference to GRPO, single-shot and draft-then-refine."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.draw import save
from benchmarks.replication import compare
from benchmarks.replication.arms import ARMS, baseline_of
from benchmarks.replication.compare import ByArm, Verdict, difference, verdict_on

COLORS = {
    Verdict.AHEAD: "#009E73",
    Verdict.LEVEL: "#0072B2",
    Verdict.BEHIND: "#D55E00",
    Verdict.OPEN: "0.55",
}
MEASURES = {"single-shot": compare.single_shot, "draft, then refine": compare.refined}
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
