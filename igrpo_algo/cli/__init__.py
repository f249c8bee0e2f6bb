"""The `igrpo` command: train, eval, demo, doctor. `python -m igrpo_algo.cli` is the same."""

import sys

from .extras import pip_line

__all__ = ["main"]


def main() -> None:
    """Run the command line. A missing package ends it with one line that says what to install."""
    try:
        from .app import app

        app()
    except ModuleNotFoundError as error:
        line = pip_line(error.name)
        if line is None:
            raise
        package = (error.name or "").partition(".")[0]
        print(f"igrpo: this needs {package}, which is not installed: {line}", file=sys.stderr)
        raise SystemExit(1) from None
