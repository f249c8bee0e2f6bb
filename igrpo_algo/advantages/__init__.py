"""Advantages: relative to a group, to other baselines, and as each trainer computes them."""
