"""A prompt and all of its completions in one row, so that the prompt is computed once."""

from .packing import SharedPromptRow, pack_shared_prompt

__all__ = ["SharedPromptRow", "pack_shared_prompt"]
