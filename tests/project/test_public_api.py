"""Each public name is specified: signature, docstring with an example, a place in the docs."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import docs_pages
import pytest
import torch

import igrpo_algo
import igrpo_kernels

ROOT = Path(__file__).resolve().parents[2]

# Parameters that users write. Further ones may follow, by keyword and with a default; `...` stands
# for a default that is free.
FIXED = {
    "igrpo_algo": """
def sample_group(prompts, sampler, n, *, seed=None): pass
def select_best_draft(rewards, *, tie_scores=None): pass
def splice_prompt(prompt, draft, *, template=...): pass
def truncate_draft(draft_ids, max_tokens, *, keep="tail"): pass
def standardize_by_group(rewards, groups=None, *, ddof=1, eps=1e-4): pass
def center_by_group(rewards, groups=None): pass
def igrpo_loss(logprobs, advantages, mask=None, *, old_logprobs=None, ref_logprobs=None,
               clip_low=0.2, clip_high=0.2, kl_coef=0.0, cu_seqlens=None, denominator=None): pass
def policy_loss(logprobs, advantages, mask=None, *, surrogate, aggregate, old_logprobs=None,
                ref_logprobs=None, kl_coef=0.0, importance_weights=None, cu_seqlens=None): pass
def two_stage_rollout(prompts, sampler, reward, *, num_drafts=4, num_refinements=4): pass
def stream_two_stage_rollout(prompts, sampler, reward, *, num_drafts=4, num_refinements=4): pass
""",
    "igrpo_kernels": """
def token_logprobs(logits, targets, *, temperature=1.0, return_entropy=False): pass
def linear_token_logprobs(hidden, weight, targets, *, bias=None, temperature=1.0, softcap=None,
                          logit_scale=1.0, return_entropy=False): pass
def clipped_policy_loss(logprobs, advantages, mask=None, *, old_logprobs=None, clip_low=0.2,
                        clip_high=0.2, dual_clip=None, cu_seqlens=None): pass
def linear_policy_loss(hidden, weight, targets, advantages, mask=None, *, surrogate, aggregate,
                       old_logprobs=None, ref_logprobs=None, kl_coef=0.0, entropy_coef=0.0,
                       temperature=1.0): pass
def Clip(low=0.2, high=0.2, dual=None): pass
def FixedLength(length, denominator=None): pass
def SequenceMean(denominator=None): pass
def TokenMean(denominator=None): pass
def Sum(denominator=None): pass
""",
}


def fixed_signatures() -> list[tuple[str, str, inspect.Signature]]:
    table = []
    for package, source in FIXED.items():
        namespace: dict[str, Any] = {}
        exec(source, namespace)
        functions = {name: f for name, f in namespace.items() if inspect.isfunction(f)}
        table += [(package, name, inspect.signature(f)) for name, f in functions.items()]
    return table


def positional(signature: inspect.Signature) -> list[tuple[str, object]]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [(p.name, p.default) for p in signature.parameters.values() if p.kind in kinds]


def keywords(signature: inspect.Signature) -> dict[str, object]:
    kind = inspect.Parameter.KEYWORD_ONLY
    return {p.name: p.default for p in signature.parameters.values() if p.kind is kind}


def lists_names(package: pkgutil.ModuleInfo) -> bool:
    """Whether a folder of igrpo_algo lists public names, and loads nothing heavy for it."""
    if not package.ispkg or package.name in {"engines", "trainers", "cli"}:
        return False
    return hasattr(importlib.import_module(f"igrpo_algo.{package.name}"), "__all__")


PACKAGES = [igrpo_kernels, igrpo_algo] + [
    importlib.import_module(f"igrpo_algo.{package.name}")
    for package in pkgutil.iter_modules(igrpo_algo.__path__)
    if lists_names(package)
]


def resolve(package: str, name: str) -> Any:
    return getattr(importlib.import_module(package), name)


@pytest.mark.parametrize(
    ("package", "name", "wanted"), fixed_signatures(), ids=lambda value: str(value)[:40]
)
def test_fixed_names_keep_their_signatures(
    package: str, name: str, wanted: inspect.Signature
) -> None:
    assert name in resolve(package, "__all__")
    actual = inspect.signature(resolve(package, name))
    assert positional(actual) == positional(wanted)
    actual_keywords = keywords(actual)
    for parameter, default in keywords(wanted).items():
        assert parameter in actual_keywords
        assert default is ... or actual_keywords[parameter] == default
    extra = {key: actual_keywords[key] for key in actual_keywords.keys() - keywords(wanted).keys()}
    assert inspect.Parameter.empty not in extra.values(), f"without a default: {extra}"


def public_names() -> list[tuple[str, str]]:
    return [(package.__name__, name) for package in PACKAGES for name in package.__all__]


def homes() -> dict[str, tuple[str, str]]:
    """Each public name once, with the first package that lists it."""
    return {name: (package, name) for package, name in reversed(public_names())}


every_name = pytest.mark.parametrize(("package", "name"), sorted(homes().values()))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_all_is_sorted_whole_and_without_private_names(package: ModuleType) -> None:
    names = package.__all__
    assert len(names) == len(set(names))
    assert [name for name in names if name.startswith("_") and name != "__version__"] == []
    assert [name for name in names if not hasattr(package, name)] == []


def is_protocol(value: object) -> bool:
    return getattr(value, "_is_protocol", False)


RECORDS = {"DraftChoice", "Rollout", "Stage", "StageFinished", "StageStarted"}


def is_result(value: object) -> bool:
    """Whether it is never made by a user, but shown where a function returns or raises it."""
    if not inspect.isclass(value):
        return False
    return issubclass(value, tuple | Exception) or value.__name__ in RECORDS


def has_signature(value: object) -> bool:
    is_dataclass = inspect.isclass(value) and dataclasses.is_dataclass(value)
    is_tuple = inspect.isclass(value) and issubclass(value, tuple)
    return inspect.isfunction(value) or is_dataclass or is_tuple


@every_name
def test_docstring_has_an_example_that_runs(package: str, name: str) -> None:
    value = resolve(package, name)
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return
    doc = inspect.getdoc(value)
    assert doc
    assert not doc.startswith(f"{name}("), "the docstring is the one Python made up"
    has_example = ">>> " in doc or is_protocol(value) or is_result(value)
    assert has_example, f"{name} has no example"


def documented_arguments(doc: str) -> dict[str, str]:
    """Descriptions under `Args:` and `Attributes:`, by name; those of another function it names."""
    found: dict[str, str] = {}
    if other := re.search(r"all arguments of `(\w+)`, and these:", doc):
        found = documented_arguments(inspect.getdoc(resolve("igrpo_algo", other[1])) or "")
    for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", doc, re.MULTILINE):
        for entry in re.split(r"\n(?=    \S)", section.rstrip()):
            name, _, text = entry.strip().partition(":")
            found[name.lstrip("*")] = text
    return found


@every_name
def test_result_is_documented(package: str, name: str) -> None:
    value = resolve(package, name)
    if not inspect.isfunction(value) or get_type_hints(value).get("return") is type(None):
        return
    assert re.search(r"^(Returns|Yields):$", inspect.getdoc(value) or "", re.MULTILINE)


@every_name
def test_arguments_are_documented_with_shapes(package: str, name: str) -> None:
    value = resolve(package, name)
    if not has_signature(value) or is_protocol(value):
        return
    documented = documented_arguments(inspect.getdoc(value) or "")
    parameters = [p.lstrip("*") for p in inspect.signature(value).parameters]
    assert [p for p in parameters if p not in documented] == []
    assert [p for p in documented if p not in parameters and inspect.isfunction(value)] == []
    hints = get_type_hints(value)
    tensors = [p for p in parameters if hints.get(p) in (torch.Tensor, torch.Tensor | None)]
    for parameter in tensors:
        text = documented[parameter] if inspect.isfunction(value) else inspect.getdoc(value)
        assert re.search(r"\[[A-Z.].*\]|[Ss]hape|[Ss]calar|[Oo]ne per", text), (
            f"{parameter}: of what shape?"
        )


def test_reference_shows_each_public_name_once() -> None:
    pages = "".join(docs_pages.reference_pages().values())
    lists = re.findall(r"^      members: \[(.+)\]$", pages, re.MULTILINE)
    shown = [name for members in lists for name in members.split(", ")]
    assert sorted(set(shown)) == sorted(shown)
    assert homes().keys() <= set(shown)


def test_map_names_what_exists_once_and_all_that_most_users_type() -> None:
    text = (ROOT / "docs" / "map.md").read_text()
    named = re.findall(r"`(\w+)`", text)
    assert sorted(set(named)) == sorted(named)
    assert {*igrpo_algo.__all__, *igrpo_kernels.__all__} <= set(named)
    known = {*docs_pages.all_public_names(), "igrpo_algo", "igrpo_kernels", "select", "generate"}
    assert set(named) - known == set()
    files = re.findall(r"`(igrpo_\w+/\S+)`", text)
    assert len(files) > 5
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_map_rows_say_where_their_names_are_imported_from() -> None:
    text = (ROOT / "docs" / "map.md").read_text()
    astray, looked_at = [], 0
    for package in ("igrpo_algo", "igrpo_kernels"):
        section = text.split(f"## {package}\n")[1].split("\n## ")[0]
        for step, cells in re.findall(r"^\|([^|]+)\|(.+)\|$", section, re.MULTILINE):
            places = [*re.findall(r"`([\w.]+)`", step)] or [package]
            places += re.findall(r"\(`([\w.]+)`\)", cells)  # of the name before it
            modules = [importlib.import_module(place) for place in places]
            names = re.findall(r"`(?!igrpo_)(\w+)`", cells)
            looked_at += len(names)
            astray += [n for n in names if not any(hasattr(module, n) for module in modules)]
    assert looked_at > 100
    assert astray == []


def examples() -> list[tuple[str, doctest.Example]]:
    """Every example of the packages, with the file it stands in."""
    found = []
    for path in (
        p for package in ("igrpo_algo", "igrpo_kernels") for p in ROOT.glob(f"{package}/**/*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node) or ""
                found += [(str(path), each) for each in doctest.DocTestParser().get_examples(doc)]
    return found


def test_no_example_echoes_a_constructor() -> None:
    echoes = [
        (path, example.source)
        for path, example in examples()
        if (call := re.match(r"([A-Z]\w*)\(", example.source)) and example.want.startswith(call[0])
    ]
    assert len(examples()) > 100
    assert echoes == []
