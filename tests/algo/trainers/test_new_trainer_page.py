"""The adapter of docs/use/new_trainer.md, run as it stands there."""

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

PAGE = Path(__file__).resolve().parents[3] / "docs" / "use" / "new_trainer.md"


class Characters:
    """A tokenizer of one token per character."""

    eos_token_id = unk_token_id = chat_template = None
    all_special_tokens = ()
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text))}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, ids))

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return list(map(chr, ids))


def test_the_adapter_of_the_page_gives_a_group_its_best_draft():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert 20 <= len(code.splitlines()) <= 40
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    asked: list[str] = []

    async def generate(ids: list[int]) -> list[int]:
        asked.append(Characters().decode(ids))
        number = str(len(asked))
        await asyncio.sleep(0)
        return list(map(ord, number))

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        assert set(answer) == {"4"}
        return [float(text) for text in completions]

    host = SimpleNamespace(
        generate=generate, reward=reward, tokenizer=Characters(), max_prompt_tokens=1000
    )

    async def group() -> list[Any]:
        samples = (namespace["sample"]("2+2?", "4", "uid", host) for _ in range(3))
        return await asyncio.gather(*samples)

    samples = asyncio.run(group())
    assert asked[:4] == ["2+2?"] * 4
    (prompt,) = {Characters().decode(prompt_ids) for prompt_ids, _, _ in samples}
    assert prompt.startswith("2+2?")
    assert "4" in prompt.removeprefix("2+2?")  # the fourth draft was the best
    assert asked[4:] == [prompt] * 3
    assert len(asked) == 4 + 3
    assert all(reward == int(Characters().decode(ids)) for _, ids, reward in samples)
