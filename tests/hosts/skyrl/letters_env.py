"""An environment of SkyRL's gym: graded, deterministic, single-turn."""

from typing import Any

from skyrl_gym.envs.base_text_env import BaseTextEnv, BaseTextEnvStepOutput

SCORED: list[tuple[str, str]] = []


class LettersEnv(BaseTextEnv):
    """Reward by the letters."""

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.answer = (extras or {})["answer"]

    def step(self, action: str) -> BaseTextEnvStepOutput:
        SCORED.append((action, self.answer))
        reward = float(sum(map(ord, action)))
        return BaseTextEnvStepOutput(observations=[], reward=reward, done=True, metadata={})
