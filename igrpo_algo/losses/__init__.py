"""The loss of iGRPO, corrections for a sampler that differs, and completions that ran too long."""
