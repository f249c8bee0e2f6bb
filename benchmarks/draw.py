"""One plot per recorded run: our time and memory over the fastest peer's, a bar for each case."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.cases import Case
from benchmarks.compare import Row, number, rows
from benchmarks.results import Record

BETTER, WORSE = "#009E73", "#D55E00"  # told apart by the colour-blind, too
LINE = 0.22  # inches
OVER_PEER = (
    "time over the fastest peer's (left of 1: igrpo is faster)",
    "peak memory over that peer's",
)
NARROW, WIDE = 0.25, 4.0  # ratios that the bars end at


@dataclass(frozen=True)
class Bar:
    """What one line of the plot shows.

    Attributes:
        group: Heading under which it stands, such as an op.
        label: Such as a size.
        time: Our time over the other's.
        time_note: Text behind the bar, beside the ratio.
        memory: The same of the peak memory; None where it was not measured.
        memory_note: The same of the peak memory.
    """

    group: str
    label: str
    time: float
    time_note: str = ""
    memory: float | None = None
    memory_note: str = ""


def draw(record: Record, path: Path) -> Path:
    """Draw a run of the kernels' benchmarks."""
    hardware, date = record["hardware"]["name"], record["date"][:10]
    title = f"igrpo over the fastest peer: {hardware}, {date}, commit {record['commit']}"
    drawn = [bar for row in rows(record) for bar in bars(row)]
    if any("*" in bar.time_note for bar in drawn):
        title += "; * computes less than the op"
    return draw_bars(drawn, title, path)


def size(case: Case) -> str:
    """A case without its op, in as few letters as tell it from its neighbours."""
    named = {"T": case.tokens, "H": case.width, "V": case.vocabulary}
    numbers = " ".join(f"{name}={value:,}" for name, value in named.items() if value)
    active = f", {case.active:.0%} active" if case.active != 1.0 else ""
    return f"{numbers} {case.dtype}{active}"


def bars(row: Row) -> list[Bar]:
    """The bar of a case; none where no peer ran."""
    best = row.over_fastest()
    if best is None:
        return []
    peer = row.peers[best.peer]
    memory, note = None, ""
    peaks = row.ours["peak_bytes"] or 0, peer["peak_bytes"] or 0
    if min(peaks) > 0 and max(peaks) > 2**20:  # a few kilobytes are nobody's concern
        memory = peaks[0] / peaks[1]
        note = " : ".join(number(peak / 2**20) for peak in peaks) + " MiB"
    time_note = " : ".join(number(figure["ms"]["median"]) for figure in (row.ours, peer))
    time_note += f" ms, {best.peer}" + ("*" if peer["computes"] else "")
    group = f"{row.case.op}, {row.case.passes}"
    return [Bar(group, size(row.case), best.value, time_note, memory, note)]


def draw_bars(
    bars: Sequence[Bar], title: str, path: Path, titles: tuple[str, str] = OVER_PEER
) -> Path:
    """Draw bars from 1, to the left where ours is better, grouped under headings."""
    groups = list(dict.fromkeys(bar.group for bar in bars))
    lines: list[str | Bar] = []
    for group in groups:
        lines += [group, *(bar for bar in bars if bar.group == group)]
    figure = Figure(figsize=(11, LINE * len(lines) + 1.1), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    for at, line in enumerate(lines):
        if isinstance(line, Bar):
            put(time, at, line.time, line.time_note)
            put(memory, at, line.memory, line.memory_note)
    labels = [line.label if isinstance(line, Bar) else line for line in lines]
    time.set_yticks(range(len(lines)), labels)
    for line, label in zip(lines, time.get_yticklabels(), strict=True):
        label.set_fontweight("normal" if isinstance(line, Bar) else "bold")
    time.set_ylim(len(lines) - 0.4, -0.6)
    frame(time, titles[0])
    frame(memory, titles[1])
    figure.suptitle(title, fontsize=10)
    return save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """Write a PNG of 32 colours, a quarter of the bytes of one of all."""
    figure.set_dpi(90)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    pixels.quantize(32).save(path, optimize=True)
    return path


def put(axes: Axes, at: int, ratio: float | None, note: str) -> None:
    """One bar from 1, its ratio at its end, the note at the panel's right."""
    if ratio is None:
        return
    better = ratio <= 1
    end = min(max(ratio, NARROW), WIDE)  # the number says what is beyond
    axes.barh(at, end - 1, left=1, height=0.7, color=BETTER if better else WORSE)
    offset, side = (-3, "right") if better else (3, "left")
    text = {"textcoords": "offset points", "va": "center", "fontsize": 8}
    axes.annotate(
        f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", (end, at), (offset, 0), ha=side, **text
    )
    edge = {"xycoords": ("axes fraction", "data"), "annotation_clip": False}
    axes.annotate(note, (1, at), (4, 0), color="0.35", **edge, **text)


def frame(axes: Axes, title: str) -> None:
    """A scale on which twice as fast is as far from 1 as twice as slow."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(NARROW / 1.8, WIDE * 1.8)
    ticks = [0.25, 0.5, 1, 2, 4]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.axvline(1, color="0.2", linewidth=1)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8, left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
