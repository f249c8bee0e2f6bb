r"""iGRPO in NeMo-RL 0.6.0: its own GRPO script, with both stages and our loss put in first.

Launch, in a clone of NeMo-RL with this package installed:

    uv run python nemo_rl_grpo.py --config examples/configs/grpo_math_1B.yaml \
        loss_fn.reference_policy_kl_penalty=0 grpo.num_generations_per_prompt=8

The rollout metrics get igrpo_draft_reward and igrpo_conditioned. Sampling grows by N / G. This
launch has not been run: tests/hosts/nemo_rl runs copies of NeMo-RL's rollout, groups and loss.
"""

import runpy

import nemo_rl.algorithms.grpo

from igrpo_algo.trainers.nemo_rl import IGRPOLossFn, use_igrpo

if __name__ == "__main__":
    use_igrpo(num_drafts=8, max_prompt_tokens=2048)
    # Its `setup` makes the loss under this name, and hands it to `grpo_train`.
    nemo_rl.algorithms.grpo.ClippedPGLossFn = lambda _, **options: IGRPOLossFn(**options)
    runpy.run_path("examples/run_grpo.py", run_name="__main__")
