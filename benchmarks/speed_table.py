"""README's table of speed, `docs/speed.md` and its pictures, made from the recorded runs.

    python -m benchmarks.speed_table

takes the newest finished run of each kind of device under benchmarks/results/. A test holds that
README and the page are what the records give.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks import cases, speed_page
from benchmarks.compare import number, rows
from benchmarks.results import RESULTS, Record, recorded
from benchmarks.speed_page import table, where

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/speed.md"
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
BETWEEN = re.compile(f"{re.escape(BEGIN)}\n(.*?){re.escape(END)}", re.DOTALL)


def newest(folder: Path = RESULTS) -> dict[str, tuple[Path, Record]]:
    """The newest finished run of each kind of device, GPUs first."""
    found = {run["device"]: (path, run) for path, run in recorded(folder) if run["finished"]}
    return dict(sorted(found.items(), reverse=True))


def readme_part(record: Record, path: str) -> str:
    """The text between README's markers: the five headlines of one run on a GPU."""
    measured = {row.case: row for row in rows(record)}
    lines = [["op", "size", "igrpo", "fastest peer", "ratio"]]
    for case in cases.headlines():
        row = measured.get(case)
        best = row and row.over_fastest()
        figures = ["not yet measured"] * 3
        if row and best:
            peer = row.peers[best.peer]
            figures = [cost(row.ours), f"{best.peer}: {cost(peer)}", f"{best.value:.2f}"]
        lines.append([f"`{case.op}`, {case.passes}", speed_page.size(case), *figures])
    return f"""{where(record)}.
Measured at commit {record["commit"]} ([every figure]({path})); later changes are not in it.

{table(lines)}
Median times, and peak memory above the inputs; below a ratio of 1 igrpo is faster. 30 % active: the other tokens are
masked or have advantage zero. [How it was measured, other sizes, peers and CPUs](docs/speed.md).
"""  # noqa: E501


def cost(figure: Record) -> str:
    """Time and peak memory of a figure."""
    text = f"{number(figure['ms']['median'])} ms"
    if figure["peak_bytes"] is not None:
        text += f", {number(figure['peak_bytes'] / 2**20)} MiB"
    return text


def between_markers(markdown: str) -> str | None:
    """The part as it stands, or None without markers."""
    match = BETWEEN.search(markdown)
    return match and match[1]


def replaced(markdown: str, new: str) -> str:
    """The text with another part between the markers."""
    if between_markers(markdown) is None:
        raise ValueError(f"no {BEGIN} and {END} in the text, each on a line of its own")
    return BETWEEN.sub(lambda _: f"{BEGIN}\n{new}{END}", markdown)


def others(kind: str, folder: Path = RESULTS) -> Iterator[tuple[str, Record]]:
    """Names and records of another benchmark's runs, the newest first."""
    for path in sorted(folder.glob(f"20*{kind}*.json"), reverse=True):
        yield path.name, json.loads(path.read_text())


def page(folder: Path = RESULTS) -> str:
    """The whole of `docs/speed.md`."""
    runs = {kind: (path.name, run) for kind, (path, run) in newest(folder).items()}
    kinds = ("train-step", "trainer-step", "shared-prompt")
    return speed_page.page(runs, *(list(others(kind, folder)) for kind in kinds))


def main() -> None:
    from benchmarks.draw import draw  # matplotlib is not needed to check the tables

    runs = newest()
    path, record = runs["cuda"]
    readme = ROOT / "README.md"
    part = readme_part(record, str(path.relative_to(ROOT)))
    readme.write_text(replaced(readme.read_text(), part))
    PAGE.write_text(page())
    for kind, (_, run) in runs.items():
        draw(run, PAGE.with_name("images") / f"speed-{kind}.png")


if __name__ == "__main__":
    main()
