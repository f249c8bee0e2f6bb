"""The link checker sees what is dead and leaves the rest alone."""

from pathlib import Path

import pytest
from check_links import complaints


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# A page\n## `f(x)`: twice!\n## Again\n## Again\n")
    (tmp_path / "runs").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "[a](docs/page.md)",
        "[a](docs/page.md#a-page)",
        "[a](docs/page.md#fx-twice)",
        "[a](docs/page.md#again-1)",
        "# Here\n[a](#here)",
        "[a](https://arxiv.org/abs/2602.09000)",
        '<img src="docs/page.md">',
        "```\n[a](gone.md)\n```",
        "`docs/page.md`, `runs/demo/`, `[P, N]`, `prompt/draft`",
    ],
)
def test_sound_pages_pass(repository: Path, text: str) -> None:
    (repository / "README.md").write_text(text)
    assert complaints(repository) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[a](gone.md)", "README.md: dead link gone.md"),
        ("![a](docs/gone.png)", "README.md: dead link docs/gone.png"),
        ('<img src="gone.png">', "README.md: dead link gone.png"),
        ("[a][b]\n\n[b]: gone.md", "README.md: dead link gone.md"),
        ("[a](docs/page.md#gone)", "README.md: dead link docs/page.md#gone"),
        ("[a](#gone)", "README.md: dead link #gone"),
        ("[a](../outside.md)", "README.md: dead link ../outside.md"),
        ("see `docs/gone.py`", "README.md: no such path docs/gone.py"),
    ],
)
def test_dead_links_are_found(repository: Path, text: str, complaint: str) -> None:
    (repository.parent / "outside.md").touch()
    (repository / "README.md").write_text(text)
    assert complaints(repository) == [complaint]
