"""What an adapter reports: a trainer that is missing, or a version that no test has seen."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


@contextmanager
def requires(package: str, oldest: str, newest: str, *, install: str = "") -> Iterator[None]:
    """Import a trainer inside this block.

    Args:
        package: What it is called on the package index.
        oldest: Of the versions tested, as "0.4".
        newest: Likewise; later patches of it count as tested.
        install: What to type to get it; by default, pip with the newest version.

    Raises:
        ImportError: The trainer is not installed; the message says what to install.

    Examples:
        >>> with requires("a-trainer", "1.0", "1.2"):
        ...     import a_trainer
        Traceback (most recent call last):
        ImportError: this adapter needs a-trainer, which is not installed: pip install...
    """
    try:
        found = version(package)
    except PackageNotFoundError:  # or run from a clone
        found = None
    if found is not None and not _is_tested(found, oldest, newest):
        tried = newest if oldest == newest else f"{oldest} to {newest}"
        warnings.warn(
            f"this adapter is tested with {package} {tried}, and {found} is installed: it builds "
            "on classes that may have changed",
            stacklevel=4,
        )
    try:
        yield
    except ImportError as error:
        if found is not None:
            raise
        raise ImportError(
            f"this adapter needs {package}, which is not installed: "
            f"{install or f'pip install {package}=={newest}.*'}"
        ) from error


def _is_tested(found: str, oldest: str, newest: str) -> bool:
    last = Version(newest).release
    return Version(oldest).release <= Version(found).release[: len(last)] <= last
