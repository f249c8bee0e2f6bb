"""iGRPO in tinker-cookbook 0.6.1: its basic recipe on GSM8K, plus one setting.

Launch, with a key of Tinker:

    TINKER_API_KEY=... python examples/tinker_math.py

The metrics get igrpo/draft_reward and igrpo/conditioned. Sampling grows by N / G.
tests/hosts/tinker_cookbook runs the rollouts with a model of our own as the policy; the launch
needs Tinker's servers and has not been run.
"""

import asyncio

from tinker_cookbook import cli_utils, model_info
from tinker_cookbook.recipes.math_rl.math_env import Gsm8kDatasetBuilder
from tinker_cookbook.rl.train import Config, main

from igrpo_algo.trainers.tinker import IGRPO


def make_config(model: str = "Qwen/Qwen3.5-9B-Base", log_path: str = "runs/tinker") -> Config:
    """Make the configuration of the basic recipe, its groups drawn in two stages."""
    renderer = model_info.get_recommended_renderer_name(model)
    return Config(
        model_name=model,
        recipe_name="igrpo_gsm8k",
        renderer_name=renderer,
        log_path=log_path,
        dataset_builder=Gsm8kDatasetBuilder(
            batch_size=128, group_size=16, renderer_name=renderer, model_name_for_tokenizer=model
        ),
        learning_rate=4e-5,
        max_tokens=512,
        eval_every=0,
        rollout_error_tolerance=IGRPO(num_drafts=8, max_prompt_tokens=2048),
    )


if __name__ == "__main__":
    config = make_config()
    cli_utils.check_log_dir(config.log_path, behavior_if_exists="ask")
    asyncio.run(main(config))
