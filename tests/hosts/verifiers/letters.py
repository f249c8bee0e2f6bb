"""A taskset for a random model, in verifiers' own terms: the reward is the sum of the letters.

Its harness asks the model once, in this process; verifiers' own would fetch packages.
"""

from typing import ClassVar

import httpx
import verifiers.v1 as vf


class LettersData(vf.TaskData):
    answer: str = ""


class LettersTask(vf.Task[LettersData, vf.State, vf.TaskConfig]):
    prompts_seen: ClassVar[list[object]] = []

    @vf.reward
    async def letters(self, task: LettersData, trace: vf.Trace) -> float:
        assert task.answer == "7"
        self.prompts_seen.append(task.prompt)
        return float(sum(map(ord, trace.last_reply)))


class Letters(vf.Taskset[LettersTask, vf.TasksetConfig]):
    def load(self) -> list[LettersTask]:
        messages = [vf.UserMessage(content="Count: 2+2?")]
        rows = ["1+1?", messages]
        return [
            LettersTask(LettersData(prompt=prompt, answer="7"), self.config.task) for prompt in rows
        ]


class OneReply(vf.Harness[vf.HarnessConfig]):
    APPENDS_SYSTEM_PROMPT = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx, trace, runtime, endpoint, secret, mcp_urls, data
    ) -> vf.ProgramResult:
        system, prompt = self.resolve_prompt(data)
        if isinstance(prompt, str):
            prompt = [vf.UserMessage(content=prompt)]
        messages = [message.model_dump(exclude_none=True) for message in prompt]
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        async with httpx.AsyncClient(timeout=60, verify=False) as client:
            answer = await client.post(
                f"{endpoint}/chat/completions",
                headers={"Authorization": f"Bearer {secret}"},
                json={"model": ctx.model, "messages": messages},
            )
        return vf.ProgramResult(int(answer.is_error), answer.text, "")


__all__ = ["Letters", "OneReply"]
