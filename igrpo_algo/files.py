"""Files that stay whole when a process dies, and that only one process and one run writes."""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from igrpo_kernels.checks import describe


def check_path(name: str, value: Any) -> Path:
    """Return `value` as a path if it is one, or a string; raise TypeError otherwise."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {describe(value)}")
    return Path(value)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole file or nothing. Its folder is made if it is missing.

    The content goes into a file beside it, which is renamed when it is on disk: readers find the
    old file or the new one.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder) / "numbers", b"1 2 3")
        ...     (Path(folder) / "numbers").read_bytes()
        b'1 2 3'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with fresh.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


@contextmanager
def sole_writer(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a file or folder for writing; another run that asks for it gets an error.

    The lock is the operating system's, on a hidden file beside `path`, so it ends with the process
    that holds it, however that ends. Readers are not kept out.

    Args:
        path: What will be written; it need not exist.

    Yields:
        Nothing.

    Raises:
        BlockingIOError: It is already held, in this process or another.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, sole_writer(Path(folder) / "journal"):
        ...     with sole_writer(Path(folder) / "journal"):
        ...         pass
        Traceback (most recent call last):
        BlockingIOError: ...journal is being written by another run
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path.with_name(f".{path.name}.lock")).acquire(blocking=False)
    except Timeout:
        raise BlockingIOError(f"{path} is being written by another run") from None
    with lock:
        yield


def check_same_run(place: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError if a file or folder belongs to a run with other settings; name them.

    Examples:
        >>> check_same_run("runs/first", {"seed": 0}, {"seed": 1})
        Traceback (most recent call last):
        ValueError: runs/first holds a run with other settings (seed was 0, is 1): rep...
    """
    changed = [
        f"{name} was {earlier.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(earlier.keys() | now.keys())
        if earlier.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{place} holds a run with other settings ({'; '.join(changed)}): repeat them, or "
            "write elsewhere"
        )
