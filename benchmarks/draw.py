"""Plots of a recorded run: time and peak memory of each op against T, peers as lines."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from benchmarks.results import Record

PANEL = ("op", "passes", "dtype", "vocabulary", "width", "active")
COLORS = {
    "igrpo": "black",
    "torch": "tab:blue",
    "torch.compile": "tab:cyan",
    "TRL": "tab:orange",
    "Liger": "tab:green",
    "Liger Triton": "tab:olive",
    "Liger scaled CE": "tab:purple",
    "QuACK CE": "tab:red",
}


def panels(record: Record) -> dict[tuple[Any, ...], list[Record]]:
    """Figures that differ in T and peer alone; those of most values of T first."""
    found: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for figure in record["figures"]:
        if figure["not_run"] is None:
            found[tuple(figure[name] for name in PANEL)].append(figure)
    return dict(sorted(found.items(), key=lambda item: -len({f["tokens"] for f in item[1]})))


def lines(figures: list[Record]) -> dict[str, list[Record]]:
    """Figures by peer, in order of T."""
    found: dict[str, list[Record]] = defaultdict(list)
    for figure in sorted(figures, key=lambda figure: figure["tokens"]):
        found[figure["peer"]].append(figure)
    return found


def draw(record: Record, folder: Path, most: int = 3) -> list[Path]:
    """Draw one plot per op and pass, of its panels with the most points; return the files."""
    by_op: dict[tuple[str, str], list[tuple[Any, ...]]] = defaultdict(list)
    found = panels(record)
    for key in found:
        by_op[key[:2]].append(key)
    return [
        draw_op(record, {key: found[key] for key in keys[:most]}, folder, f"{op}, {passes}")
        for (op, passes), keys in by_op.items()
    ]


def draw_op(
    record: Record, chosen: dict[tuple[Any, ...], list[Record]], folder: Path, title: str
) -> Path:
    figure, axes = pyplot.subplots(
        2, len(chosen), figsize=(4.2 * len(chosen), 6.4), squeeze=False, layout="constrained"
    )
    for (time, memory), (key, figures) in zip(axes.T, chosen.items(), strict=True):
        _, _, dtype, vocabulary, width, active = key
        size = f"V={vocabulary} " * bool(vocabulary) + f"H={width} " * bool(width)
        time.set_title(f"{size}{dtype}, {active:.0%} active", fontsize=9)
        for peer, points in lines(figures).items():
            x = [point["tokens"] for point in points]
            style = {"color": COLORS.get(peer, "gray"), "marker": "o", "markersize": 3}
            medians = [point["ms"]["median"] for point in points]
            below = [point["ms"]["median"] - point["ms"]["p20"] for point in points]
            above = [point["ms"]["p80"] - point["ms"]["median"] for point in points]
            time.errorbar(x, medians, yerr=[below, above], label=peer, **style)
            if all(point["peak_bytes"] is not None for point in points):
                memory.plot(x, [point["peak_bytes"] / 2**20 for point in points], **style)
        floor = lines(figures)["igrpo"]
        x, floors = ([point[name] for point in floor] for name in ("tokens", "floor_ms"))
        time.plot(x, floors, color="gray", linestyle="--", marker="_", label="floor")
        for axis, label in ((time, "ms"), (memory, "MiB above the inputs")):
            axis.set(xscale="log", yscale="log", ylabel=label, xlabel="T")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(f"{title}: {record['hardware']['name']}, {record['date'][:10]}", fontsize=10)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (title.replace(", ", "-").replace(" ", "-") + ".png")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
