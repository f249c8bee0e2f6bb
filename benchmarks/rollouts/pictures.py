"""The benchmark's pictures: wall time over GRPO per variant, and two timelines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from igrpo_algo.rollouts.timeline import plot_rollout_timeline

from .simulation import Setting

COLORS = {
    "barrier": "#0072B2",
    "stream, refinements first": "#E69F00",
    "stream": "#D55E00",
    "early selection": "#009E73",
}


def draw_bars(panels: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw wall time over GRPO, one panel per engine, with 95 % intervals.

    Args:
        panels: By title: figures of each variant, as `over_grpo` gives them.
        path: The PNG.
    """
    figure = Figure(figsize=(4.6 * len(panels), 3.6), dpi=150, layout="constrained")
    for axes, (title, variants) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items(), strict=True
    ):
        for x, (name, color) in enumerate(COLORS.items()):
            wall = variants[name]["wall_over_grpo"]
            spread = [[wall["mean"] - wall["low"]], [wall["high"] - wall["mean"]]]
            axes.bar(x, wall["mean"], color=color, width=0.7)
            axes.errorbar(x, wall["mean"], yerr=spread, color="0.2", capsize=3, linewidth=1)
            axes.annotate(f"{wall['mean']:.2f}", (x, 0.05), ha="center", color="white", fontsize=10)
        axes.axhline(1, color="0.2", linewidth=1, linestyle="--")
        axes.set_xticks(range(len(COLORS)), [name.replace(", ", ",\n") for name in COLORS])
        axes.tick_params(labelsize=8.5)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].set_ylabel("time over GRPO's", fontsize=9)
    figure.savefig(path)


def draw_timelines(setting: Setting, folder: Path) -> None:
    """Draw a barrier and a stream on the same lengths and the same axis of time."""
    titles = {
        "barrier": "Barrier: Stage 2 waits for the longest draft of all prompts",
        "stream": "Stream, drafts first: each prompt waits for its own drafts and a free slot",
    }
    runs = {name: setting.simulate(name, seed=0) for name in titles}
    for name, title in titles.items():
        figure = plot_rollout_timeline(runs[name].rollouts, title=title)
        figure.axes[0].set_xlim(0, 1.02 * max(run.seconds for run in runs.values()))
        figure.savefig(folder / f"timeline_{name}.png")
