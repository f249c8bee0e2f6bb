r"""iGRPO in SkyRL 0.4.0 (Python 3.12): its experiment with a generator around its own.

Launch:

    python examples/skyrl_igrpo.py trainer.algorithm.policy_loss_type=igrpo \
        trainer.algorithm.loss_reduction=sequence_mean trainer.algorithm.use_kl_loss=false \
        generator.n_samples_per_prompt=8 environment.env_class=gsm8k data.train_data="['...']" ...

The logs get igrpo/mean_draft_reward and igrpo/mean_conditioned. Sampling grows by N / G.
tests/hosts/skyrl runs `get_generator` with SkyRL's generator; the whole launch needs vLLM on a GPU
and has not been run.
"""

import sys
from typing import Any

import ray
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.utils import validate_cfg
from skyrl.train.utils.utils import initialize_ray

from igrpo_algo.trainers.skyrl import IGRPOGenerator


class IGRPOExp(BasePPOExp):
    """SkyRL's experiment, both stages in its generator."""

    def get_generator(self, cfg: Any, tokenizer: Any, inference_engine_client: Any) -> Any:
        """Put iGRPO around SkyRL's generator."""
        theirs = super().get_generator(cfg, tokenizer, inference_engine_client)
        return IGRPOGenerator(theirs, num_drafts=8)


@ray.remote(num_cpus=1)
def run(cfg: SkyRLTrainConfig) -> None:
    """Train, away from the head node."""
    IGRPOExp(cfg).run()


if __name__ == "__main__":
    settings = SkyRLTrainConfig.from_cli_overrides(sys.argv[1:])
    validate_cfg(settings)
    initialize_ray(settings)
    ray.get(run.remote(settings))
