"""Counts on a command line."""

import argparse


def positive(text: str) -> int:
    """Read a count from 1 on."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a count from 1 on, got {text!r}")
    return int(text)
