"""iGRPO's loss in prime-rl 0.8; its rollouts are `igrpo_algo.trainers.verifiers`.

    [trainer.loss]
    type = "custom"
    import_path = "igrpo_algo.trainers.prime_rl.igrpo_loss"
    kwargs = { high = 0.28 }

prime-rl calls it with one sequence at a time, adds up, and divides by the tokens of the whole step:
an average over tokens as in DAPO; the paper takes the mean of each sequence first.
"""

from typing import Any

from igrpo_kernels import Clip, Sum
from igrpo_kernels.surrogates import Surrogate

from .. import policy_loss
from .versions import requires

with requires(
    "prime-rl", "0.8", "0.8", install="it is on no index, see github.com/PrimeIntellect-ai/prime-rl"
):
    from prime_rl.trainer.rl.loss import LossInputs, LossOutputs


def igrpo_loss(
    inputs: LossInputs, *, low: float = 0.2, high: float = 0.2, dual: float | None = None
) -> LossOutputs:
    """Compute the sum of the clipped losses of one sequence; settings come from `kwargs` in TOML.

    Args:
        inputs: prime-rl's tensors, each of shape [T]: log-probs now, log-probs as sampled,
            advantages, and which tokens count.
        low: The ratio is clipped to at least 1 - low.
        high: The ratio is clipped to at most 1 + high.
        dual: Dual clip; None leaves it out.

    Returns:
        The sum, and the surrogate's metrics.
    """
    return surrogate_loss(inputs, Clip(low, high, dual))


def surrogate_loss(inputs: LossInputs, surrogate: Surrogate, **options: Any) -> LossOutputs:
    """Compute the sum of any surrogate over one sequence, for a loss of your own.

    Args:
        inputs: prime-rl's tensors, each of shape [T].
        surrogate: Any surrogate of `igrpo_kernels`.
        options: Passed to `policy_loss`: `kl_coef` with `ref_logprobs`, say.

    Returns:
        The sum, and the surrogate's metrics.
    """
    weights = inputs.loss_weights
    result = policy_loss(
        inputs.trainer_logprobs[None],
        inputs.advantages[None],
        inputs.loss_mask[None],
        surrogate=surrogate,
        aggregate=Sum(),
        old_logprobs=inputs.inference_logprobs[None],
        importance_weights=None if weights is None else weights[None],
        **options,
    )
    return LossOutputs(loss=result.loss, metrics=result.metrics)
