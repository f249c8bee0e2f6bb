"""README's table of speed, made from recorded runs.

    python -m benchmarks.speed_table benchmarks/results/2026-11-24-2105-amd-epyc.json

puts the table of these runs between the markers in README, one part per run, and names each run's
file; with no argument it makes the table anew from the files that README names. A test holds that
README's table is what those files give.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Record

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
BETWEEN = re.compile(f"{re.escape(BEGIN)}\n(.*?){re.escape(END)}", re.DOTALL)
NAMED = re.compile(r"\]\((benchmarks/results/[^)]+\.json)\)")
NO_GPU = "**On a GPU: not yet measured.**\n"
CASE = ("op", "passes", "dtype", "tokens", "vocabulary", "width", "active")
Group = dict[str, Any]


def number(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def groups(record: Record) -> Iterator[tuple[Group, dict[str, Group]]]:
    """Cases in the order they were run, with each peer's figure."""
    found: dict[tuple[Any, ...], dict[str, Group]] = {}
    for figure in record["figures"]:
        key = tuple(figure[name] for name in CASE)
        found.setdefault(key, {})[figure["peer"]] = figure
    for key, peers in found.items():
        yield dict(zip(CASE, key, strict=True)), peers


def cell(figure: Group | None, ours: Group) -> str:
    """A peer's milliseconds with our share of them, and its peak memory."""
    if figure is None or figure["not_run"] is not None:
        return "not run"
    text = number(figure["ms"]["median"])
    if figure["peer"] != ours["peer"] and ours["ms"]:
        text += f" ({ours['ms']['median'] / figure['ms']['median']:.2f})"
    if figure["peak_bytes"] is not None:
        text += f", {number(figure['peak_bytes'] / 2**20)}"
    return text + ("*" if figure["computes"] else "")


def worst_error(figure: Group) -> str:
    return f"{max(figure['errors'].values()):.0e}" if figure["errors"] else ""


def table_of(record: Record, path: str) -> str:
    """One recorded run: a line that says where and when, a table, and notes."""
    cases = list(groups(record))
    peers = list(dict.fromkeys(peer for _, figures in cases for peer in figures))
    ran = [p for p in peers if any(f[p]["not_run"] is None for _, f in cases if p in f)]
    gpu = record["device"] == "cuda"
    head = ["op", "size", *ran, *(["of the floor"] if gpu else []), "error"]
    rows = [head, ["---"] * len(head)]
    for case, figures in cases:
        ours = figures["igrpo"]
        size = f"{case['dtype']}, T={case['tokens']}"
        size += f" H={case['width']}" * bool(case["width"])
        size += f" V={case['vocabulary']}" * bool(case["vocabulary"])
        size += f", {case['active']:.0%} active" * (case["active"] != 1.0)
        floor = [f"{ours['share_of_floor']:.0%}" if ours["share_of_floor"] else ""]
        cells = [cell(figures.get(peer), ours) if peer in figures else "" for peer in ran]
        name = f"`{case['op']}`, {case['passes']}"
        rows.append([name, size, *cells, *(floor if gpu else []), worst_error(ours)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([heading(record, path), "", *lines, "", notes(record), ""])


def heading(record: Record, path: str) -> str:
    hardware, versions = record["hardware"], record["versions"]
    where = hardware["name"]
    if record["device"] == "cpu":
        where += f", {hardware['cores']} cores, {hardware['threads']} threads"
    else:
        rates, copy = record["ceilings"]["operations_per_second"], record["ceilings"]
        where += f", driver {versions['driver']}, measured {rates['bf16'] / 1e12:.0f} TFLOP/s bf16"
        where += f" and {copy['copy_bytes_per_second'] / 1e12:.2f} TB/s copied"
    packages = ", ".join(
        f"{name} {versions[name]}"
        for name in ("torch", "triton", "trl", "liger-kernel", "quack-kernels")
        if versions.get(name)
    )
    return (
        f"{where}; {packages}; {record['date'][:10]}, commit {record['commit']} "
        f"([every figure]({path})):"
    )


def notes(record: Record) -> str:
    others = {
        f"{figure['peer']}: {figure['computes']}"
        for figure in record["figures"]
        if figure["computes"] and figure["not_run"] is None
    }
    text = (
        "Milliseconds (our share of them), and peak MiB above the inputs; medians, peers in turns; "
        "error: our largest against float64."
    )
    return text + (f" *{'; '.join(sorted(others))}." if others else "")


def table(paths: Sequence[str], root: Path = ROOT) -> str:
    """What stands between the markers: a part per run, and a word where no GPU was measured."""
    records = [json.loads((root / path).read_text()) for path in paths]
    parts = [table_of(record, path) for record, path in zip(records, paths, strict=True)]
    if not any(record["device"] == "cuda" for record in records):
        parts.append(NO_GPU)
    return "\n".join(parts)


def between_markers(markdown: str) -> str | None:
    """The table as it stands, or None without markers."""
    match = BETWEEN.search(markdown)
    return match and match[1]


def named_runs(markdown: str) -> list[str]:
    """The recorded runs that the table names."""
    return NAMED.findall(between_markers(markdown) or "")


def replaced(markdown: str, new: str) -> str:
    """The text with another table between the markers."""
    if between_markers(markdown) is None:
        raise ValueError(f"no {BEGIN} and {END} in the text, each on a line of its own")
    return BETWEEN.sub(lambda _: f"{BEGIN}\n{new}{END}", markdown)


def main(arguments: Sequence[str]) -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    paths = [str(Path(path).resolve().relative_to(ROOT)) for path in arguments]
    readme.write_text(replaced(text, table(paths or named_runs(text))))


if __name__ == "__main__":
    main(sys.argv[1:])
