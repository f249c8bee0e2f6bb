"""MkDocs hook: the pages made from what lives elsewhere.

README, changelog, the help of the command, and the reference: every public name of the packages,
on the page of the module that its package imports it from.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
COPIES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
REFERENCE = {
    "algo/rollouts.md": (
        "Sampling and rollouts",
        "igrpo_algo",
        (
            *("sampling", "completions", "two_stage", "rollouts", "scoring", "single_flight"),
            *("progress", "timeline"),
        ),
    ),
    "algo/drafts.md": (
        "Drafts and prompts",
        "igrpo_algo",
        ("drafts", "prompts", "splicing", "prompt_budget", "markers"),
    ),
    "algo/rewards.md": ("Rewards and data", "igrpo_algo", ("rewards", "data")),
    "algo/advantages.md": (
        "Advantages",
        "igrpo_algo",
        ("advantages", "baselines", "advantage_presets", "groups"),
    ),
    "algo/losses.md": ("Losses", "igrpo_algo", ("losses", "corrections", "lengths")),
    "algo/shared_prompt.md": ("Shared prompts", "igrpo_algo", ("shared_prompt",)),
    "algo/metrics.md": ("Metrics", "igrpo_algo", ("metrics", "intervals")),
    "kernels/logprobs.md": (
        "Log-probs",
        "igrpo_kernels",
        ("logprobs_from_logits", "logprobs_from_hidden", "vocabulary_shard"),
    ),
    "kernels/policy_loss.md": (
        "Policy loss",
        "igrpo_kernels",
        ("loss_from_logprobs", "clipped_losses", "loss_from_hidden", "sequences"),
    ),
    "kernels/surrogates.md": ("Surrogates", "igrpo_kernels", ("surrogates",)),
    "kernels/aggregates.md": ("Aggregates", "igrpo_kernels", ("aggregates",)),
    "kernels/kl.md": ("KL", "igrpo_kernels", ("kl",)),
}
TO_DOCS = re.compile(r"(\]\(|src=\"|srcset=\"|href=\")(?:\./)?docs/")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:\s]+)(?:#[^)]*)?\)")


def public_names(package: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name) for each name that a package imports from a module of its own."""
    for node in ast.parse((ROOT / package / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            module = node.module.partition(".")[0]
            yield from ((module, alias.name) for alias in node.names)


def reference_pages() -> dict[str, str]:
    """Write a page of directives for each row of the table; every public name must have one."""
    placed = {(package, module) for _, package, modules in REFERENCE.values() for module in modules}
    found: dict[tuple[str, str], list[str]] = {}
    for package in ("igrpo_algo", "igrpo_kernels"):
        for module, name in public_names(package):
            found.setdefault((package, module), []).append(name)
    if homeless := sorted(set(found) - placed):
        raise PluginError(f"public names of modules without a page in docs_pages.py: {homeless}")
    pages = {}
    for page, (title, package, modules) in REFERENCE.items():
        names = [name for module in modules for name in found.get((package, module), [])]
        pages[page] = f"# {title}\n\n" + "".join(f"::: {package}.{name}\n\n" for name in names)
    return pages


def as_page(text: str) -> str:
    """Point links into docs/ at their pages; of links to other files keep only the text."""

    def settle(link: re.Match[str]) -> str:
        label, name = link.groups()
        if name in COPIES:
            return f"[{label}]({COPIES[name]})"
        return label if (ROOT / name).exists() else link.group()

    return LINK.sub(settle, TO_DOCS.sub(r"\1", text))


def command_help() -> str:
    """Describe every command and option of `igrpo`, as typer writes it."""
    command = ["typer", "igrpo_algo.cli.app", "utils", "docs", "--name", "igrpo"]
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise PluginError(f"igrpo can't describe its commands: {done.stderr}")
    return done.stdout


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/."""
    copies = {page: as_page((ROOT / source).read_text()) for source, page in COPIES.items()}
    pages = {**copies, **reference_pages(), "use/cli.md": command_help()}
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files
