r"""iGRPO in ms-swift 4.6.0: a plugin of one call.

Launch:

    swift rlhf --rlhf_type grpo --external_plugins examples/swift_plugin.py \
        --model Qwen/Qwen3-0.6B --dataset ... --reward_funcs accuracy --num_generations 8

Rewards, template and losses stay ms-swift's. The logs get igrpo/draft_reward, igrpo/uplift and
igrpo/refinement_zero_std. tests/hosts/swift runs it inside ms-swift's own command.
"""

from igrpo_algo.trainers.swift import use_igrpo

use_igrpo(num_drafts=4)
