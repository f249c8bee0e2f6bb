"""An aggregate for trainers that know the weight of each token before the loss is computed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from igrpo_kernels.sequences import Sequences


@dataclass(frozen=True)
class GivenWeights:
    """An aggregate whose weights are known: those of a whole step, for some of its rows.

    Attributes:
        values: The weight of each token in the loss. Shape [B, T], or [L] packed.
    """

    values: Tensor

    def weights(self, sequences: Sequences, dtype: torch.dtype) -> Tensor:
        """Return the weights, in the shape in which they were given."""
        return self.values.to(dtype)
