"""iGRPO in prime-rl through verifiers 0.4.0: a module on PYTHONPATH, named by `env.id`.

Launch, with examples/prime_rl.toml beside it:

    PYTHONPATH=examples uv run rl @ examples/prime_rl.toml

The metrics of the refinements get igrpo_draft_reward and igrpo_conditioned. Sampling grows by
N / G. tests/hosts/verifiers runs the environment under verifiers' own classes, against a server;
the launch of prime-rl needs GPUs and has not been run.
"""

from igrpo_algo.trainers.verifiers import IGRPOEnv

__all__ = ["IGRPOEnv"]
