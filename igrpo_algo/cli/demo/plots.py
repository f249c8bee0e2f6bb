"""The picture of the demo: what each arm did with the same number of completions."""

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
    "both-stages": "#009E73",
    "random-draft": "#AA4499",
}
"""One color per arm, told apart by color-blind eyes too."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a metric of the held-out problems or of training."""

    title: str
    metric: str
    split: str
    top: float | None = None
    percent: bool = False


ACCURACY = Panel(
    "Single-shot accuracy, held-out problems", "accuracy", "held-out", 1.0, percent=True
)
REWARD = Panel("Mean reward, training", "reward", "train", 1.0)
SMALL = (
    REWARD,
    Panel("Groups without variance (of 8; of 4)", "zero_variance", "train", 1.0, percent=True),
    Panel("Entropy, held-out [nats per token]", "entropy", "held-out"),
    Panel("Response length, held-out [tokens]", "length", "held-out"),
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
        title: What stands above the panels.
    """
    figure = Figure(figsize=(12, 5.6), dpi=150, layout="constrained")
    axes = figure.subplot_mosaic(
        [["accuracy", "reward", "zero_variance"], ["accuracy", "entropy", "length"]],
        width_ratios=[1.5, 1, 1],
    )
    last = max((row["completions"] for row in rows), default=1)
    for panel in (ACCURACY, *SMALL):
        for arm, label in labels.items():
            _draw_arm(axes[panel.metric], rows, arm, panel, label)
        _dress(axes[panel.metric], panel, last)
    for arm in labels:
        draft = Panel("", "draft_reward", "train")
        _draw_arm(axes["reward"], rows, arm, draft, "", dashed=True)
    handles, names = axes["accuracy"].get_legend_handles_labels()
    if handles:
        axes["accuracy"].legend(handles, names, loc="lower right", frameon=False, fontsize=11)
    if any(line.get_linestyle() == "--" for line in axes["reward"].lines):
        _explain_stages(axes["reward"])
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, the whole of it or nothing."""
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue())


def _draw_arm(
    axes: Axes, rows: Sequence[Record], arm: str, panel: Panel, label: str, *, dashed: bool = False
) -> None:
    curves = curves_by_seed(rows, arm, panel.split, panel.metric)
    if not curves:
        return
    style = "--" if dashed else "-"
    color = COLORS[arm]
    if len(curves) > 1 and not dashed:
        for points in curves.values():
            axes.plot(*zip(*points, strict=True), color=color, linewidth=0.7, alpha=0.35)
    mean = mean_curve(curves)
    if mean:
        axes.plot(*zip(*mean, strict=True), style, color=color, linewidth=2, label=label)


def _dress(axes: Axes, panel: Panel, last: float) -> None:
    axes.set_title(panel.title, fontsize=10.5, loc="left")
    axes.set_xlabel("completions sampled", fontsize=9)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set_xlim(0, last)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1 if panel.top is None else panel.top)
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.tick_params(labelsize=9)


def _explain_stages(axes: Axes) -> None:
    handles = [
        axes.plot([], [], "--", color="0.3", linewidth=2)[0],
        axes.plot([], [], "-", color="0.3", linewidth=2)[0],
    ]
    axes.legend(
        handles,
        ["Stage 1: drafts", "trained completions"],
        frameon=False,
        fontsize=8.5,
        loc="lower right",
    )


def _thousands(value: float, _position: int) -> str:
    return f"{value / 1000:g}k" if value else "0"
