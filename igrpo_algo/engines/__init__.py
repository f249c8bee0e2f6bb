"""Samplers: `transformers`, `static` and `vllm`. Import what you use: nothing here imports one.

All of them are an `EngineSampler` (`base`), draw from a `Distribution`, and take over weights with
`sync_weights` (`weights`).
"""
