"""Which of vLLM's log-probs a loss can use.

A loss computes log softmax(logits / T) over the whole vocabulary. vLLM gives log-probs from before
the temperature ("raw_logprobs", its default) or from after the cut ("processed_logprobs"):

    T      cut    usable
    1      no     either
    1      yes    raw_logprobs
    other  no     processed_logprobs
    other  yes    neither
"""

from ..distribution import Distribution

RAW, PROCESSED = "raw_logprobs", "processed_logprobs"


def usable_modes(distribution: Distribution) -> list[str]:
    """List the values of vLLM's `logprobs_mode` whose log-probs a loss can use, best first.

    Raises:
        ValueError: No mode will do.

    Examples:
        >>> usable_modes(Distribution(temperature=0.7)), usable_modes(Distribution(top_k=9))
        (['processed_logprobs'], ['raw_logprobs'])
    """
    unchanged = distribution.temperature == 1
    modes = [PROCESSED] * (not distribution.is_cut) + [RAW] * unchanged
    if not modes:
        raise ValueError(
            f"temperature = {distribution.temperature} with top_p, top_k or min_p: vLLM gives "
            "log-probs before the temperature or after the cut, and a loss can use neither. Sample "
            "at temperature 1, or without a cut, or pass logprobs=False if no loss needs them"
        )
    return modes


def check_mode(mode: str, distribution: Distribution, where: str, option: str) -> None:
    """Raise unless an engine gives log-probs that a loss can use.

    Args:
        mode: Its `logprobs_mode`.
        distribution: What is drawn from.
        where: The engine, for the message.
        option: How its mode is set, for the message.

    Raises:
        ValueError: It does not; the message says how to start it.
    """
    usable = usable_modes(distribution)
    if mode not in usable:
        raise ValueError(
            f"{where} gives {mode}, which no loss can use for this distribution: start it with "
            f"{option.format(usable[0])}, or pass logprobs=False if no loss needs them"
        )
