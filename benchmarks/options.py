"""What the commands of the benchmarks have in common: counts, a device, a dtype and an output."""

import argparse
from pathlib import Path

from benchmarks.cases import DTYPES


def positive(text: str) -> int:
    """Read a count from 1 on."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a count from 1 on, got {text!r}")
    return int(text)


def parser_of(doc: str | None, **counts: int | None) -> argparse.ArgumentParser:
    """Begin the command that a module's docstring describes, with its counts and `--output`.

    Args:
        doc: The docstring.
        **counts: An option each, with its default.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    for name, default in counts.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, default=default)
    parser.add_argument("--output", type=Path, help="the JSON; default: under results/")
    return parser


def add_device(parser: argparse.ArgumentParser, device: str = "cpu") -> None:
    """Add where a model runs."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default=device)


def add_dtype(parser: argparse.ArgumentParser, dtype: str | None = "fp32") -> None:
    """Add the dtype of a model's weights."""
    parser.add_argument("--dtype", choices=DTYPES, default=dtype)
