"""Samplers, one file per engine. Import the one you use: `igrpo_algo.engines.transformers`."""
