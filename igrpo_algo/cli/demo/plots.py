"""The picture of the demo: each arm's results with the same number of completions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from ...files import write_whole
from ..metrics_file import Record

Points = list[tuple[float, float]]

COLORS = {
    "grpo": "#0072B2",
    "igrpo": "#D55E00",
    "both-worst": "#009E73",
    "both-best": "#E69F00",
    "random": "#AA4499",
}
"""One color per arm, also distinguishable for color-blind readers."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a rate among the held-out problems or in training."""

    title: str
    metric: str
    split: str


PANELS = (
    Panel("Right, single-shot", "accuracy", "held-out"),
    Panel("Right, draft and then refine", "refined_accuracy", "held-out"),
    Panel("Groups without variance: no gradient", "zero_variance", "train"),
    Panel("Refinements that copy their draft", "copy_rate", "train"),
)


def curves_by_seed(rows: Sequence[Record], arm: str, split: str, metric: str) -> dict[int, Points]:
    """Collect (completions, value) for each seed of an arm, in the order of the rows.

    Examples:
        >>> row = {"arm": "grpo", "seed": 0, "split": "train", "completions": 8, "reward": 0.5}
        >>> curves_by_seed([row], "grpo", "train", "reward")
        {0: [(8, 0.5)]}
    """
    curves: dict[int, Points] = {}
    for row in rows:
        if row["arm"] == arm and row["split"] == split and metric in row:
            curves.setdefault(row["seed"], []).append((row["completions"], row[metric]))
    return curves


def mean_curve(curves: Mapping[int, Points]) -> Points:
    """Average over seeds where every seed has a value.

    Examples:
        >>> mean_curve({0: [(0, 1.0), (8, 2.0)], 1: [(0, 3.0)]})
        [(0, 2.0)]
    """
    values: dict[float, list[float]] = {}
    for points in curves.values():
        for completions, value in points:
            values.setdefault(completions, []).append(value)
    full = [(x, ys) for x, ys in values.items() if len(ys) == len(curves)]
    return [(x, fmean(ys)) for x, ys in sorted(full)]


def build_figure(rows: Sequence[Record], labels: Mapping[str, str], title: str) -> Figure:
    """Draw all panels: thin lines are seeds, thick ones their mean.

    Args:
        rows: The metrics file of all runs.
        labels: What to call each arm, in the order of the legend.
        title: Above the panels.
    """
    figure = Figure(figsize=(12, 6.6), dpi=150, layout="constrained")
    last = max((row["completions"] for row in rows), default=1)
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for arm, label in labels.items():
            _draw_arm(axes, rows, arm, panel, label)
        _dress(axes, panel, last)
    first, *_ = figure.axes
    if first.lines:
        first.legend(loc="lower right", frameon=False, fontsize=10)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, the whole of it or nothing."""
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())


def _draw_arm(axes: Axes, rows: Sequence[Record], arm: str, panel: Panel, label: str) -> None:
    curves = curves_by_seed(rows, arm, panel.split, panel.metric)
    if len(curves) > 1:
        for points in curves.values():
            axes.plot(*zip(*points, strict=True), color=COLORS[arm], linewidth=0.7, alpha=0.35)
    mean = mean_curve(curves)
    if mean:
        axes.plot(*zip(*mean, strict=True), color=COLORS[arm], linewidth=2, label=label)


def _dress(axes: Axes, panel: Panel, last: float) -> None:
    axes.set_title(panel.title, fontsize=10.5, loc="left")
    axes.set_xlabel("completions sampled", fontsize=9)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_xlim(0, last)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.tick_params(labelsize=9)


def _thousands(value: float, _position: int) -> str:
    return f"{value / 1000:g}k" if value else "0"
