"""iGRPO in prime-rl, through verifiers 0.4: an environment with the roles drafter and refiner.

It works with any taskset and the taskset's own rewards. `env.id` names a module that exports the
environment, so a file of two lines has to be on the path:

    from igrpo_algo.trainers.verifiers import IGRPOEnv
    __all__ = ["IGRPOEnv"]

An episode is a whole group: N drafts, which are not trained on, and G refinements of the best one.
prime-rl therefore takes `algo.type = "grpo"` with `group_size = 1`: its baseline is the mean over
what an episode trains on, the refinements. `igrpo_algo.trainers.prime_rl` is the loss. Evaluate
without this environment: to choose a draft reads the rewards.
"""

import asyncio
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field, TypeAdapter

from ..drafts.rules import DraftRules
from ..prompts import Prompt
from ..rollouts.once_per_group import HostDraft, check_rules, fit_to_tokenizer, stage_one
from ..seeds import derive_seed
from .versions import requires

with requires("verifiers", "0.4", "0.4"):
    import verifiers.v1 as vf
    from renderers.base import load_tokenizer


class IGRPOEnvConfig(vf.EnvConfig):
    """Settings, under `env` in TOML and `--env.` on the command line.

    Attributes:
        drafter: Draws the drafts; by default, the model that is trained.
        refiner: Draws the refinements.
        num_drafts: N.
        num_refinements: G.
        max_prompt_tokens: Maximum tokens of a spliced prompt. The draft is cut to fit, the question
            never is; counted for clients of type "train", which name a tokenizer.
        seed: For random ties, random drafts and dropout.
        max_concurrent_agents: All drafts run at once, then all refinements; verifiers' own default
            is one at a time.
    """

    drafter: vf.AgentConfig = vf.AgentConfig()
    refiner: vf.AgentConfig = vf.AgentConfig()
    num_drafts: int = Field(4, ge=1)
    num_refinements: int = Field(4, ge=1)
    max_prompt_tokens: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)
    max_concurrent_agents: int | None = Field(None, ge=1)


class IGRPOEnv(vf.Env[IGRPOEnvConfig]):
    """Both stages of one prompt as one episode.

    A draft is the last reply of its run, whatever tools were used on the way. An agent that fails
    fails its episode, as in any environment of verifiers: `drafter.retries` repeats its run.

    Attributes:
        rules: How a draft is chosen and spliced. Set it in a subclass. Control tokens and the
            budget of a `TextSplice` come from the tokenizer that a client of type "train" names.
    """

    rules: ClassVar[DraftRules] = DraftRules()

    def __init__(self, config: IGRPOEnvConfig) -> None:
        check_rules(self.rules)
        super().__init__(config)

    async def setup(self, agents: vf.Agents) -> None:
        """Take the drafts out of what is trained on."""
        agents.drafter.trainable = False

    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        """Draw both stages.

        Raises:
            ValueError: The task has no prompt, or one without a user message.
            RuntimeError: A draft failed.
        """
        prompt = _as_chat(task.data)

        async def draw(_: int) -> HostDraft:
            return _as_draft(await agents.drafter.run(task))

        async def score(drafts: Sequence[HostDraft]) -> list[float]:
            for trace in (draft.host for draft in drafts):
                if not trace.ok:
                    error = trace.last_error
                    raise RuntimeError(f"a draft failed: {error and error.message}")
            return [draft.host.reward for draft in drafts]

        stage_two = await stage_one(
            prompt,
            draw,
            score,
            rules=self._fit_rules(agents.refiner),
            num_drafts=self.config.num_drafts,
            seed=derive_seed(self.config.seed, task.key),
            columns=task.data.model_dump(exclude={"prompt"}),
        )
        refined = _with_prompt(task, stage_two.prompt)
        async with asyncio.TaskGroup() as group:
            for _ in range(self.config.num_refinements):
                group.create_task(agents.refiner.run(refined))

    async def finalize(self, task: vf.Task, episode: vf.Episode) -> None:
        """Note on each refinement how the drafts did, and whether it saw one."""
        drafts = episode.by_agent["drafter"]
        for trace in episode.by_agent["refiner"]:
            trace.record_metrics(
                {
                    "igrpo_draft_reward": sum(each.reward for each in drafts) / len(drafts),
                    "igrpo_conditioned": trace.task.data.prompt != task.data.prompt,
                }
            )

    def _fit_rules(self, refiner: vf.Agent) -> DraftRules:
        client = refiner.config.client
        if not isinstance(client, vf.TrainClientConfig):
            return self.rules
        tokenizer = _load_tokenizer(client.renderer_model_name or refiner.config.model)
        sampling = refiner.config.sampling.model_dump()
        return fit_to_tokenizer(
            self.rules,
            tokenizer,
            self.config.max_prompt_tokens,
            sampling.get("chat_template_kwargs"),
        )


_load_tokenizer = functools.cache(load_tokenizer)
_MESSAGES: TypeAdapter[Any] = TypeAdapter(vf.Messages)


def _as_chat(data: vf.TaskData) -> list[dict[str, Any]]:
    if data.prompt is None:
        raise ValueError(
            f"task {data.idx} has no prompt: where the user opens the conversation, there is no "
            "place for a draft"
        )
    if isinstance(data.prompt, str):
        messages = [{"role": "user", "content": data.prompt}]
    else:
        messages = [message.model_dump(exclude_none=True) for message in data.prompt]
    if data.system_prompt is None:
        return messages
    return [{"role": "system", "content": data.system_prompt}, *messages]


def _with_prompt(task: vf.Task, prompt: Prompt) -> vf.Task:
    """Give the task another prompt; its rewards still read the original one."""
    messages: Any = prompt if task.data.system_prompt is None else prompt[1:]
    if isinstance(task.data.prompt, str):
        refined = task.with_data(prompt=messages[0]["content"])
    else:
        refined = task.with_data(prompt=_MESSAGES.validate_python(messages))
    refined.score = task.score
    return refined


def _as_draft(trace: vf.Trace) -> HostDraft:
    """Return the last reply of a run: its tokens where the client knows them, and its text."""
    replies = [node for node in trace.nodes if node.sampled]
    if not replies:
        return HostDraft([], "", host=trace)
    last = replies[-1]
    ids = [token for token, sampled in zip(last.token_ids, last.mask, strict=True) if sampled]
    thinking = last.message.reasoning_content
    thought = f"<think>{thinking}</think>" if thinking else ""
    return HostDraft(ids, thought + trace.last_reply, host=trace)
