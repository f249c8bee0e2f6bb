r"""iGRPO in ms-swift 4.6.0: a plugin of one call.

Launch:

    swift rlhf --rlhf_type grpo --external_plugins examples/swift_plugin.py \
        --model Qwen/Qwen3-0.6B --dataset ... --reward_funcs accuracy --num_generations 8

Its rewards, template and losses stay. Expect igrpo/draft_reward, igrpo/uplift and
igrpo/refinement_zero_std in the logs. Run in tests/hosts/swift inside ms-swift's own command.
"""

from igrpo_algo.trainers.swift import use_igrpo

use_igrpo(num_drafts=4)
