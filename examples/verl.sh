#!/usr/bin/env bash
# iGRPO in verl 0.9.1: install this package beside verl, which finds it by its entry point.
# Each sample gets extra_fields["igrpo_draft_rewards"]. tests/hosts/verl runs the agent loop, the
# loss and the engine; this launch line needs vLLM on a GPU and has not been run.
set -euo pipefail
python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="${TRAIN:?a parquet file}" data.val_files="${VAL:?a parquet file}" \
    data.max_prompt_length=4096 data.max_response_length=4096 \
    actor_rollout_ref.model.path="${MODEL:-Qwen/Qwen3-0.6B}" \
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.agent.default_agent_loop=igrpo +igrpo.num_drafts=8 \
    actor_rollout_ref.actor.policy_loss.loss_mode=igrpo \
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean "$@"
