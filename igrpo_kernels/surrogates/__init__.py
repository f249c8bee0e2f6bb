"""Clipped-ratio losses and related ones as values: hyper-parameters in, losses of tokens out."""

from .base import MAX_LOG_RATIO, Surrogate, TokenLosses, Tokens
from .clipped import Clip, Gmpo, SequenceClip, SequenceTokenClip
from .covariance import ClipCov, KlCov
from .weighted import Cispo, DppoKl, DppoTv, Reinforce, Sapo, Vespo

__all__ = [
    "MAX_LOG_RATIO",
    "Cispo",
    "Clip",
    "ClipCov",
    "DppoKl",
    "DppoTv",
    "Gmpo",
    "KlCov",
    "Reinforce",
    "Sapo",
    "SequenceClip",
    "SequenceTokenClip",
    "Surrogate",
    "TokenLosses",
    "Tokens",
    "Vespo",
]
