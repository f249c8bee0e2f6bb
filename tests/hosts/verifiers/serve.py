"""vLLM's generate endpoint, as prime-rl calls it, over the tiny model and our own sampler."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from igrpo_algo.engines.transformers import TransformersSampler


class Server:
    """Serves `/inference/v1/generate`; keeps what it was asked for and what it answered."""

    def __init__(self, sampler: TransformersSampler, max_model_len: int = 1024) -> None:
        self.sampler = sampler
        self.max_model_len = max_model_len
        self.asked: list[list[int]] = []
        self.answered: list[tuple[str, str]] = []
        self.fail_on: int | None = None

    async def models(self, _: web.Request) -> web.Response:
        card = {"id": "tiny", "max_model_len": self.max_model_len}
        return web.json_response({"data": [card]})

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        ids, params = body["token_ids"], body["sampling_params"]
        self.asked.append(ids)
        if len(self.asked) == self.fail_on:
            return web.json_response({"error": "out of order"}, status=400)
        seed = len(self.asked)
        await asyncio.sleep(0)
        ((drawn,),) = self.sampler.sample([ids], 1, seed=seed)
        self.answered.append((self.sampler.tokenizer.decode(ids), drawn.text))
        assert params["logprobs"] == 1
        pairs = zip(drawn.token_ids, drawn.logprobs, strict=True)
        content = [{"token": f"token_id:{token}", "logprob": logprob} for token, logprob in pairs]
        choice = {
            "token_ids": drawn.token_ids,
            "logprobs": {"content": content},
            "finish_reason": drawn.finish_reason,
        }
        return web.json_response({"request_id": str(seed), "choices": [choice]})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Serve on a free port; give the address."""
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/inference/v1/generate", self.generate)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
        finally:
            await runner.cleanup()
