"""Check the links of every Markdown file without a network: files, anchors, paths in backticks.

A relative link must lead to a file of this repository, an anchor to a heading of the page it names,
and a path that README, CONTRIBUTING or AGENTS name in backticks must exist.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"site", "build", "dist", "runs"}
GUIDES = ("README.md", "CONTRIBUTING.md", "AGENTS.md")
FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
REFERENCE = re.compile(r"^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
HTML = re.compile(r"(?:src|srcset|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*)`")


def prose(text: str) -> str:
    """Blank out code, which may hold anything that looks like a link."""
    return CODE.sub("", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """Names that headings and explicit ids get, as GitHub makes them."""
    found: set[str] = set(re.findall(r"(?:id|name)=\"([^\"]+)\"", text))
    for heading in HEADING.findall(FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        copies = sum(1 for name in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", name))
        found.add(f"{slug}-{copies}" if copies else slug)
    return found


def targets(text: str) -> Iterator[str]:
    """Yield what links, images and references of a page point to."""
    for pattern in (LINK, REFERENCE, HTML):
        yield from pattern.findall(prose(text))


def dead_links(page: Path, root: Path) -> Iterator[str]:
    """Yield the targets in a page that lead nowhere."""
    text = page.read_text()
    for target in targets(text):
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        goal = (page.parent / name).resolve() if name else page
        there = goal.exists() and goal.is_relative_to(root)
        if there and anchor and goal.suffix == ".md":
            there = anchor in anchors(goal.read_text())
        if not there:
            yield target


def missing_paths(page: Path, root: Path) -> Iterator[str]:
    """Yield the paths named in backticks that start in a folder of the repository and don't exist.

    What the tools write (`runs/`, `site/`) need not be there.
    """
    for name in PATH.findall(FENCE.sub("", page.read_text())):
        first = name.partition("/")[0]
        if (root / first).is_dir() and first not in SKIPPED and not (root / name).exists():
            yield name


def pages(root: Path) -> list[Path]:
    """Markdown files of the repository: none hidden, none that a tool wrote."""
    found = (path.relative_to(root) for path in root.rglob("*.md"))
    return sorted(
        root / path
        for path in found
        if not any(part in SKIPPED or part.startswith(".") for part in path.parts)
    )


def complaints(root: Path) -> list[str]:
    """Everything that is wrong, one line each."""
    found = [
        f"{page.relative_to(root)}: dead link {target}"
        for page in pages(root)
        for target in dead_links(page, root)
    ]
    for page in filter(Path.exists, map(root.joinpath, GUIDES)):
        found += [f"{page.name}: no such path {name}" for name in missing_paths(page, root)]
    return found


if __name__ == "__main__":
    sys.exit("\n".join(complaints(ROOT)) or 0)
