"""vLLM as the sampler: `VllmSampler` in this process, `VllmServerSampler` over HTTP."""

from .in_process import VllmSampler
from .server import VllmServerSampler

__all__ = ["VllmSampler", "VllmServerSampler"]
