"""Drafts: which one is chosen (`select`, `rules`), and how it gets into the prompt.

`text` splices strings and chat messages, `token_ids` lists of ids, `splice` does either with limits
of length (`budget`), and `markers` keeps a draft from writing turns of its own.
"""
