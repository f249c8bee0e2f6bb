"""What an adapter says of a trainer that is missing, or of a version that no test has seen."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version


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
        yield
    except ImportError as error:
        try:
            version(package)
        except PackageNotFoundError:
            raise ImportError(
                f"this adapter needs {package}, which is not installed: "
                f"{install or f'pip install {package}=={newest}.*'}"
            ) from error
        raise
    try:
        found = version(package)
    except PackageNotFoundError:  # run from a clone
        return
    if not _release(oldest) <= _release(found)[: len(_release(newest))] <= _release(newest):
        tried = newest if oldest == newest else f"{oldest} to {newest}"
        warnings.warn(
            f"this adapter is tested with {package} {tried}, and {found} is installed: it builds "
            "on classes that may have changed",
            stacklevel=4,
        )


def _release(text: str) -> list[int]:
    """Give the numbers that a version begins with.

    Examples:
        >>> _release("0.8.1.dev9")
        [0, 8, 1]
    """
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return numbers
