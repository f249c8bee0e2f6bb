"""The pages, written from the records: what a user needs first, and every table behind it."""

from pathlib import Path

from benchmarks.replication import again, compare, ladder, prose
from benchmarks.replication.basis import basis, counts, weights_of
from benchmarks.replication.overview import forms, takeaway
from benchmarks.replication.plot import draw, draw_ladder
from benchmarks.replication.tables import (
    Maps,
    costs,
    diagnostics,
    first_warnings,
    forgotten,
    more,
    ordered,
    section,
)
from benchmarks.speed_page import table
from igrpo_algo.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
FOLDER, IMAGES = ROOT / "docs/method", ROOT / "docs/images"
PAGE, TABLES = "replication.md", "replication_tables.md"
PLOT, LADDER_PLOT = "replication.png", "replication-ladder.png"


def write_pages(records: Path, folder: Path = FOLDER, images: Path = IMAGES) -> None:
    """Write both pages and their plots from a folder of records."""
    everything = compare.read_records(records)
    maps = again.planned_seeds(everything)
    draw(maps, images / PLOT)
    if rungs := ladder.rungs_of(maps):
        draw_ladder(rungs, images / LADDER_PLOT)
    write_whole(folder / PAGE, build_page(everything).encode())
    write_whole(folder / TABLES, build_tables(everything).encode())


def build_page(everything: Maps) -> str:
    """Give the page that a user reads first."""
    maps = again.planned_seeds(everything)
    return joined(
        prose.HEAD.format(weights=weights_of(maps)),
        takeaway(maps),
        prose.ADVICE.format(first=first_warnings(maps), forgotten=forgotten(maps)),
        prose.FORMS,
        table(forms(maps)),
        *again.section(everything),
        "## What it rests on",
        basis(maps),
        *ladder.section(maps, f"../images/{LADDER_PLOT}"),
        prose.REAL_MODEL,
        prose.PAPER,
    )


def build_tables(everything: Maps) -> str:
    """Give the page of all tables, by task and size."""
    maps = again.planned_seeds(everything)
    places = ordered(maps)
    return joined(
        prose.TABLES,
        "## The runs",
        table(counts(maps)),
        "## Where iGRPO is ahead, level, behind",
        prose.MAP,
        f"![Single-shot and draft-then-refine accuracy less GRPO's](../images/{PLOT})",
        *(section(place, arms) for place, arms in places),
        *ladder.tables(maps),
        "## At equal tokens and equal time",
        prose.COSTS,
        *(f"**{place}**\n\n{table(costs(arms))}" for place, arms in places),
        "## What the diagnostics said beforehand",
        prose.DIAGNOSTICS,
        *(f"**{place}**\n\n{table(diagnostics(arms))}" for place, arms in places),
        "## Rounds, pass@k, length and entropy",
        prose.MORE,
        *(f"**{place}**\n\n{table(more(arms))}" for place, arms in places),
    )


def joined(*parts: str) -> str:
    """Put the parts of a page below one another."""
    return "\n\n".join(part.strip() for part in parts) + "\n"
