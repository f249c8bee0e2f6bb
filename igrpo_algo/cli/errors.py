"""A user's mistake ends a command with one line instead of a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..rollouts.scoring import RewardError


@contextmanager
def usage_errors(command: str) -> Iterator[None]:
    """Turn ValueError, TypeError, OSError and ImportError of a block into one line and exit code 2.

    For the part of a command that reads what the user gave. A package that is not installed
    passes through: `main` names the extra it comes with.
    """
    try:
        yield
    except ModuleNotFoundError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"igrpo {command}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


@contextmanager
def run_errors(command: str) -> Iterator[None]:
    """Turn an error of the user's reward or prompts into one line and exit code 1.

    For the part of a command that runs what the user gave: a reward that raises or returns anything
    but one number per completion, a prompt that is too long for the model.
    """
    try:
        yield
    except (RewardError, ValueError, TypeError) as error:
        print(f"igrpo {command}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
