r"""iGRPO in OpenRLHF 0.11.2: an agent file, its class made in one line.

Launch:

    python -m openrlhf.cli.train_ppo_ray --train.agent_func_path examples/openrlhf_agent.py \
        --rollout.n_samples_per_prompt 8 --actor.loss_agg_mode seq-mean-token-mean \
        --algo.advantage.estimator group_norm ...

Give chat messages (--data.input_key messages) and leave --data.apply_chat_template off. The logs
get igrpo_draft_reward and igrpo_conditioned. Sampling grows by N / G. tests/hosts/openrlhf runs
the agent under OpenRLHF's own executors; the whole launch has not been run.
"""

from igrpo_algo.rewards import math_reward
from igrpo_algo.trainers.openrlhf import make_agent_executor

AgentExecutor = make_agent_executor(math_reward, num_drafts=4)
