"""Samplers: `transformers` and `vllm`. Import the one you use; nothing here imports either.

All of them are an `EngineSampler` (`base`), draw from a `Distribution`, and take over weights with
`sync_weights` (`weights`).
"""
