"""Seeds: each prompt, stage and sample has one of its own, independent of its neighbors."""

import hashlib
from collections.abc import Sequence

from igrpo_kernels.checks import describe


def derive_seed(seed: int, *path: int | str) -> int:
    """Make an independent seed in [0, 2**63) out of a seed and where it is used.

    Examples:
        >>> derive_seed(0, 1) == derive_seed(0, 1) != derive_seed(0, 2)
        True
    """
    name = "/".join(str(part) for part in (seed, *path)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def prompt_seeds(seed: int | Sequence[int] | None, count: int) -> list[int] | None:
    """Give each of `count` prompts its own seed; None stays None."""
    if seed is None:
        return None
    if isinstance(seed, int) and not isinstance(seed, bool):
        return [derive_seed(seed, index) for index in range(count)]
    if (
        isinstance(seed, str)
        or not isinstance(seed, Sequence)
        or not all(type(each) is int for each in seed)
    ):
        raise TypeError(f"seed must be an int or a list of them, got {describe(seed)}")
    if len(seed) != count:
        raise ValueError(f"seed must hold one int per prompt: {len(seed)} for {count} prompts")
    return list(seed)
