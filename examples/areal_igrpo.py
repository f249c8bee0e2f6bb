r"""iGRPO in AReaL 1.0.4: its GSM8K script with another workflow.

Launch, with AReaL's own settings for GSM8K:

    python examples/areal_igrpo.py --config gsm8k_grpo.yaml scheduler.type=local \
        gconfig.n_samples=8 actor.reward_norm.mean_level=group actor.reward_norm.std_level=group \
        actor.reward_norm.group_size=8 actor.adv_norm=null

The rollout's statistics get igrpo_draft_reward and igrpo_conditioned. Sampling grows by N / G.
tests/hosts/areal runs the workflow in AReaL's groups; the whole launch needs SGLang or vLLM on a
GPU and has not been run.
"""

import sys
from typing import Any


def workflow_kwargs(config: Any) -> dict[str, Any]:
    """Give what AReaL makes the workflow from."""
    return {
        "reward_fn": "areal.reward.gsm8k.gsm8k_reward_fn",
        "gconfig": config.gconfig,
        "tokenizer": config.tokenizer_path,
        "num_drafts": 8,
    }


def main(arguments: list[str]) -> None:
    """Train on GSM8K."""
    from areal import PPOTrainer
    from areal.api.cli_args import GRPOConfig, load_expr_config
    from areal.dataset import get_custom_dataset
    from areal.utils.hf_utils import load_hf_tokenizer

    config, _ = load_expr_config(arguments, GRPOConfig)
    tokenizer = load_hf_tokenizer(config.tokenizer_path)
    train, test = (
        get_custom_dataset(split=split, dataset_config=of_split, tokenizer=tokenizer)
        for split, of_split in (("train", config.train_dataset), ("test", config.valid_dataset))
    )
    kwargs = workflow_kwargs(config)
    plain = {name: value for name, value in kwargs.items() if name != "num_drafts"}
    with PPOTrainer(config, train_dataset=train, valid_dataset=test) as trainer:
        trainer.train(
            workflow="igrpo_algo.trainers.areal.IGRPOWorkflow",
            workflow_kwargs=kwargs,
            eval_workflow="areal.workflow.rlvr.RLVRWorkflow",
            eval_workflow_kwargs={**plain, "gconfig": config.gconfig.new(temperature=0.6)},
        )


if __name__ == "__main__":
    main(sys.argv[1:])
