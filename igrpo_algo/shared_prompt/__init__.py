"""A prompt and all of its completions in one row, so that the prompt is computed once."""

from .attention import attend_shared_prompt
from .packing import SharedPromptRow, pack_shared_prompt

__all__ = ["SharedPromptRow", "attend_shared_prompt", "pack_shared_prompt"]
