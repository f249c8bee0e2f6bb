"""iGRPO in TRL: `IGRPOTrainer` and its `IGRPOConfig`."""

from .config import IGRPOConfig
from .trainer import IGRPOTrainer

__all__ = ["IGRPOConfig", "IGRPOTrainer"]
