"""MkDocs hook: the pages made from what lives elsewhere.

README, changelog, the help of the command, and the reference: every public name of the packages,
on the page of the part that defines it.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
COPIES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
REFERENCE = {  # page: title, where its names are defined
    "algo/rollouts.md": ("Sampling and rollouts", ("igrpo_algo.rollouts", "igrpo_algo.batch")),
    "algo/drafts.md": (
        "Drafts and prompts",
        ("igrpo_algo.drafts", "igrpo_algo.prompts", "igrpo_algo.thinking"),
    ),
    "algo/rewards.md": ("Rewards", ("igrpo_algo.rewards",)),
    "algo/advantages.md": ("Advantages", ("igrpo_algo.advantages",)),
    "algo/losses.md": ("Losses", ("igrpo_algo.losses",)),
    "algo/shared_prompt.md": ("Shared prompts", ("igrpo_algo.shared_prompt",)),
    "algo/metrics.md": ("Metrics", ("igrpo_algo.metrics",)),
    "kernels/logprobs.md": (
        "Log-probs",
        (
            "igrpo_kernels.logprobs_from_logits",
            "igrpo_kernels.logprobs_from_hidden",
            "igrpo_kernels.vocabulary_shard",
        ),
    ),
    "kernels/policy_loss.md": (
        "Policy loss",
        (
            "igrpo_kernels.loss_from_logprobs",
            "igrpo_kernels.clipped_losses",
            "igrpo_kernels.loss_from_hidden",
            "igrpo_kernels.sequences",
        ),
    ),
    "kernels/surrogates.md": ("Surrogates", ("igrpo_kernels.surrogates",)),
    "kernels/aggregates.md": ("Aggregates", ("igrpo_kernels.aggregates",)),
    "kernels/kl.md": ("KL", ("igrpo_kernels.kl",)),
}
FIRST = (  # modules that a page begins with
    "igrpo_algo.rollouts.two_stage",
    "igrpo_algo.rollouts.sampling",
    "igrpo_algo.drafts.rules",
    "igrpo_algo.rewards.matching",
    "igrpo_algo.advantages.of_groups",
    "igrpo_kernels.surrogates.base",
)
SHOWN_WHOLE = (  # modules whose every name is public, though no package above them lists it
    "igrpo_algo.advantages.presets",
    "igrpo_algo.rollouts.once_per_group",
    "igrpo_kernels.aggregates",
    "igrpo_kernels.kl",
    "igrpo_kernels.sequences",
    "igrpo_kernels.surrogates",
)
MODULE = """::: {}
    options:
      members: [{}]
      show_root_heading: false
      show_root_toc_entry: false

"""
OUT_OF_DOCS = re.compile(r"\[([^\]]*)\]\(\.\./\.\./[^)]*\)")
TO_DOCS = re.compile(r"(\]\(|src=\"|srcset=\"|href=\")(?:\./)?docs/")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:\s]+)(?:#[^)]*)?\)")


def public_names(package: str) -> dict[str, str]:
    """Map each name that a package imports from a module of its own to where it is defined."""
    folder = ROOT / package.replace(".", "/")
    if not folder.is_dir():
        tree = ast.parse(folder.with_suffix(".py").read_text())
        return {
            node.name: f"{package}.{node.name}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith(("_", "check_"))
        }
    names = {}
    for node in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            module = f"{package}.{node.module}" if node.level else node.module
            if module.startswith("igrpo_"):
                names |= {alias.name: f"{module}.{alias.name}" for alias in node.names}
    for name, path in names.items():  # re-exported from a folder of its own
        inner = path.removesuffix(f".{name}")
        if (ROOT / inner.replace(".", "/")).is_dir():
            names[name] = public_names(inner)[name]
    return names


def all_public_names() -> dict[str, str]:
    """Map every public name, of both packages and of the folders, to where it is defined."""
    folders = {path for _, paths in REFERENCE.values() for path in paths if "algo." in path}
    packages = ["igrpo_kernels", "igrpo_algo", *sorted(folders), *SHOWN_WHOLE]
    names = {name: path for package in packages for name, path in public_names(package).items()}
    return names | {"PolicyLoss": "igrpo_kernels.loss_from_logprobs.PolicyLoss"}


def reference_pages() -> dict[str, str]:
    """Write a page of directives for each row of the table; every public name must have one.

    Each module comes with what its docstring says of all its names, and then with the names.
    """
    homeless = set(all_public_names().values())
    pages = {}
    for page, (title, parts) in REFERENCE.items():
        modules: dict[str, list[str]] = {}
        for part in parts:
            for path in all_public_names().values():
                if path.startswith(f"{part}."):
                    module, _, name = path.rpartition(".")
                    modules.setdefault(module, []).append(name)
                    homeless.discard(path)
        order = sorted(modules, key=lambda module: module not in FIRST)
        shown = (MODULE.format(module, ", ".join(modules[module])) for module in order)
        pages[page] = f"# {title}\n\n" + "".join(shown)
    if homeless:
        raise PluginError(f"public names without a page in docs_pages.py: {sorted(homeless)}")
    return pages


def as_page(text: str) -> str:
    """Point links into docs/ at their pages; of links to other files keep only the text."""

    def settle(link: re.Match[str]) -> str:
        label, name = link.groups()
        if name in COPIES:
            return f"[{label}]({COPIES[name]})"
        return label if (ROOT / name).exists() else link.group()

    return LINK.sub(settle, TO_DOCS.sub(r"\1", text))


def on_page_markdown(markdown: str, **_: object) -> str:
    """Keep only the text of links from a page to files outside docs/."""
    return OUT_OF_DOCS.sub(r"\1", markdown)


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
