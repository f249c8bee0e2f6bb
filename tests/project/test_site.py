"""The built site: each public name once, nothing internal, examples as code, code that fits."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import docs_pages
import pytest

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 92  # of code fit the text at a window of 1280 pixels, with docs/assets/extra.css
VOID = {"meta", "link", "img", "br", "hr", "input", "source", "path"}


class Page(HTMLParser):
    """Collects headings' ids, the text of code blocks, and quotations."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.blocks: list[str] = []
        self.quotations = 0
        self.text = text
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        if re.fullmatch(r"h[1-6]", tag) and names.get("id"):
            self.ids.append(names["id"] or "")
        if tag == "pre":
            self.blocks.append("")
        self.quotations += tag == "blockquote"
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "pre" in self._open:
            self.blocks[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """Every page by its name, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--quiet"]
    subprocess.run([*command, "--site-dir", str(folder)], cwd=ROOT, check=True)
    return {
        str(path.relative_to(folder)): Page(path.read_text()) for path in folder.rglob("*.html")
    }


def reference(site: dict[str, Page]) -> Iterator[tuple[str, Page]]:
    return ((name, page) for name, page in site.items() if name.startswith(("algo/", "kernels/")))


def test_each_public_name_has_one_heading(site: dict[str, Page]) -> None:
    shown = Counter(name for _, page in reference(site) for name in page.ids if "." in name)
    public = docs_pages.all_public_names()
    assert {name: shown[path] for name, path in public.items() if shown[path] != 1} == {}


def test_nothing_internal_is_shown(site: dict[str, Page]) -> None:
    public = set(docs_pages.all_public_names().values())
    strays = [
        name
        for _, page in reference(site)
        for name in page.ids
        if "." in name and name not in public and name.rpartition(".")[0] not in public
    ]
    assert strays == []


def test_examples_are_code(site: dict[str, Page]) -> None:
    assert [name for name, page in reference(site) if page.quotations] == []
    assert sum(">>>" in block for _, page in reference(site) for block in page.blocks) > 50


def test_what_is_returned_is_one_row(site: dict[str, Page]) -> None:
    tables = [
        table
        for _, page in reference(site)
        for table in re.findall(r">Returns:<.*?</table>", page.text, re.DOTALL)
    ]
    assert len(tables) > 50
    assert {table.count("<tr") for table in tables} == {2}  # the head's, and this one


def test_what_holds_for_all_names_of_a_module_stands_before_them(site: dict[str, Page]) -> None:
    text = site["algo/advantages.html"].text
    convention = text.index("NaN is an unscored reward")
    assert convention < text.index('id="igrpo_algo.advantages.of_groups.center_by_group"')


def test_code_is_no_wider_than_its_column(site: dict[str, Page]) -> None:
    wide = [
        (name, line)
        for name, page in site.items()
        for block in page.blocks
        for line in block.splitlines()
        if len(line) > COLUMNS and not re.match(r" *(before|after)=", line)  # a template's value
    ]
    assert wide == []


def test_the_reader_of_pages_sees_what_it_looks_for() -> None:
    page = Page('<h2 id="a.b">x</h2><p>y<br></p><pre><code>1\n2</code></pre><blockquote>z')
    assert (page.ids, page.blocks, page.quotations) == (["a.b"], ["1\n2"], 1)
