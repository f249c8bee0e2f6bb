"""A prompt and all of its completions in one row, so that the prompt is computed once."""
