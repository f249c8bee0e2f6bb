"""Seeds: one for each prompt, stage and sample, independent of its neighbors."""

import hashlib
from collections.abc import Sequence

from igrpo_kernels.checks import describe


def derive_seed(seed: int, *path: int | str) -> int:
    """Derive an independent seed in [0, 2**63) from a seed and the place of its use.

    Examples:
        >>> derive_seed(0, 1) == derive_seed(0, 1) != derive_seed(0, 2)
        True
    """
    name = "/".join(str(part) for part in (seed, *path)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1


def prompt_seeds(seed: int | Sequence[int] | None, count: int) -> list[int] | None:
    """Derive a seed for each of `count` prompts; None stays None."""
    if seed is None:
        return None
    if isinstance(seed, int) and not isinstance(seed, bool):
        return [derive_seed(seed, index) for index in range(count)]
    if (
        isinstance(seed, str | bytes)
        or not isinstance(seed, Sequence)
        or not all(type(each) is int for each in seed)
    ):
        raise TypeError(f"seed must be an int or a list of them, got {describe(seed)}")
    if len(seed) != count:
        raise ValueError(f"seed must hold one int per prompt: {len(seed)} for {count} prompts")
    return list(seed)
