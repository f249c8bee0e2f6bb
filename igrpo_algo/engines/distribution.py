"""The distribution that a sampler draws tokens from, as a value.

Tokens are drawn from softmax(logits / T), cut to fewer tokens where a user asks for that. Their
log-probs are always those of the whole vocabulary at the temperature, as a loss computes them
again, so that the ratio of a policy to itself is 1.
"""

from dataclasses import dataclass, fields

from igrpo_kernels.checks import check_count, check_number


@dataclass(frozen=True)
class Distribution:
    """softmax(logits / T), cut in vLLM's order: by `min_p`, then `top_k`, then `top_p`.

    Attributes:
        temperature: T; at 0 the most probable token is taken.
        top_p: Keeps the fewest tokens whose probabilities add up to this, in (0, 1]; 1 keeps all.
        top_k: Keeps this many tokens; 0 keeps all.
        min_p: Keeps tokens of at least this share of the highest probability, in [0, 1]; 0 keeps
            all.

    Raises:
        TypeError: A field is not a number.
        ValueError: One is out of range, or a cut is asked for at temperature 0.

    Examples:
        >>> Distribution().is_cut, Distribution(0.7, top_k=50).is_cut
        (False, True)
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, at_least=0)
        check_number("top_p", self.top_p, above=0, at_most=1)
        check_count("top_k", self.top_k, at_least=0)
        check_number("min_p", self.min_p, at_least=0, at_most=1)
        for field in fields(self) if self.is_greedy else ():
            value = getattr(self, field.name)
            if field.name != "temperature" and value != field.default:
                raise ValueError(f"{field.name} has no effect at temperature 0, got {value}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken: a point mass has no useful log-probs."""
        return self.temperature == 0

    @property
    def is_cut(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0
