"""The picture of a rollout: when each prompt was in which stage, so that a barrier is visible."""

import os
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

from igrpo_kernels.checks import describe

from ..files import check_path, write_whole
from ..thinking import check_text
from .records import Rollout, Rollouts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"drafts": "#0072B2", "waiting": "0.85", "refinements": "#D55E00"}
"""One color per kind of span, also distinguishable for color-blind readers."""

LATER_ROUNDS = ("#009E73", "#AA4499", "#E69F00", "#56B4E9")


class Span(NamedTuple):
    """A time that a prompt spent in a stage, or between two.

    Attributes:
        kind: "drafts", "waiting", "refinements", "refinements, round 2" and so on.
        started: Seconds since the rollout began.
        ended: The same.
    """

    kind: str
    started: float
    ended: float


def plot_rollout_timeline(
    rollouts: Rollouts, path: str | os.PathLike[str] | None = None, *, title: str = ""
) -> Any:
    """Draw when each prompt was drafting, waiting and refining.

    One row per prompt, sorted by start. Where Stage 2 waits for the drafts of all prompts, every
    refinement begins on one vertical line, with gray before it; a stream has no such line. Waiting
    is all time between two stages: for the reward, for a barrier, for free slots. Time before the
    first stage is blank, and so is a stage that drew nothing.

    Args:
        rollouts: What `two_stage_rollout` returned, or `Rollouts.of` a stream.
        path: Where to write the picture, the whole of it or nothing; its ending is the format
            (png, svg, pdf). None writes no file.
        title: Above the picture.

    Returns:
        A `matplotlib.figure.Figure`; it belongs to no window and needs no closing.

    Raises:
        TypeError: `rollouts` is something else.
        ValueError: No stage of `rollouts` drew anything, or matplotlib has no such format.
        ImportError: matplotlib is not installed.

    Examples:
        >>> from igrpo_algo import Completion, two_stage_rollout
        >>> def sampler(prompts, n, seed):
        ...     return [[Completion([i], str(i)) for i in range(n)] for _ in prompts]
        >>> rollouts = two_stage_rollout(["q"], sampler, lambda prompts, completions: [1.0] * 4)
        >>> figure = plot_rollout_timeline(rollouts, title="One prompt")
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['drafts', 'waiting', 'refinements']
    """
    from matplotlib.figure import Figure

    if not isinstance(rollouts, Rollouts):
        raise TypeError(f"rollouts must be Rollouts, got {describe(rollouts)}")
    target = None if path is None else check_path("path", path)
    check_text("title", title)
    rows = [spans for rollout in rollouts if (spans := list(stage_spans(rollout)))]
    if not rows:
        raise ValueError("rollouts must hold a stage with completions, got none")
    rows.sort(key=lambda spans: (spans[0].started, spans[-1].ended))
    figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    rounds = max(len(rollout.refinements) for rollout in rollouts)
    later = [_kind(number) for number in range(2, rounds + 1)]
    colors = COLORS | {kind: LATER_ROUNDS[i % len(LATER_ROUNDS)] for i, kind in enumerate(later)}
    for kind, color in colors.items():
        _draw(axes, rows, kind, color)
    _dress(axes, len(rows), title)
    if target is not None:
        picture = BytesIO()
        figure.savefig(picture, format=target.suffix.removeprefix(".") or "png")
        write_whole(target, picture.getvalue())
    return figure


def stage_spans(rollout: Rollout) -> Iterator[Span]:
    """Yield a prompt's spans in order of time; a stage that drew nothing has none."""
    before = None
    for number, stage in enumerate(rollout.stages):
        if all(completion.finish_reason == "skipped" for completion in stage.completions):
            continue
        if before is not None and stage.started > before:
            yield Span("waiting", before, stage.started)
        yield Span(_kind(number), stage.started, stage.ended)
        before = stage.ended


def _kind(number: int) -> str:
    names = {0: "drafts", 1: "refinements"}
    return names.get(number, f"refinements, round {number}")


def _draw(axes: "Axes", rows: list[list[Span]], kind: str, color: str) -> None:
    found = [(y, span) for y, spans in enumerate(rows) for span in spans if span.kind == kind]
    if found:
        ys, spans = zip(*found, strict=True)
        widths = [span.ended - span.started for span in spans]
        lefts = [span.started for span in spans]
        axes.barh(ys, widths, left=lefts, height=1.0, color=color, label=kind, linewidth=0)
    else:
        axes.barh([], [], color=color, label=kind)


def _dress(axes: "Axes", rows: int, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=10.5, loc="left")
    axes.set_xlabel("seconds since the rollout began", fontsize=9)
    axes.set_ylabel("prompts, by start", fontsize=9)
    axes.set_xlim(left=0)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False)
