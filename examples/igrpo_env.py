"""iGRPO in prime-rl through verifiers 0.4.0: the module that `env.id` names, on PYTHONPATH.

Launch, with examples/prime_rl.toml beside it:

    PYTHONPATH=examples uv run rl @ examples/prime_rl.toml

Expect igrpo_draft_reward and igrpo_conditioned among the metrics of the refinements, and N / G
times more sampling. Run in tests/hosts/verifiers under verifiers' own classes, against a server;
the launch of prime-rl, which needs GPUs, was read, not run.
"""

from igrpo_algo.trainers.verifiers import IGRPOEnv

__all__ = ["IGRPOEnv"]
