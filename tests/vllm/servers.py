"""Real vLLM servers, each in processes of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tiny_models import CONTEXT

# A server's engine is a process of its own whatever this process does; its cache is 1 GiB at least.
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}


class VllmServer:
    """A server of a model's folder, from its start until it is stopped or killed."""

    def __init__(self, folder: Path, log: Path, logprobs_mode: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        options = {
            "--model": folder,
            "--served-model-name": "tiny",
            "--dtype": "float32",
            "--max-model-len": CONTEXT,
            "--max-num-seqs": 32,
            "--block-size": 32,
            "--logprobs-mode": logprobs_mode,
            "--scheduling-policy": "priority",
            "--host": "127.0.0.1",
            "--port": port,
        }
        words = [str(word) for pair in options.items() for word in pair]
        flags = ["--enforce-eager", "--enable-prompt-tokens-details"]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *flags]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **ENVIRONMENT},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float = 900) -> None:
        """Wait until it answers."""
        give_up = time.monotonic() + seconds
        while time.monotonic() < give_up and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/v1/models", timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")

    def drawn(self) -> int:
        """Count the tokens that its engine has drawn, once it draws no more."""
        counts = [-1, self._drawn_so_far()]
        while counts[-1] != counts[-2]:
            time.sleep(0.3)
            counts.append(self._drawn_so_far())
        return counts[-1]

    def _drawn_so_far(self) -> int:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        (line,) = (line for line in lines if line.startswith("vllm:generation_tokens_total{"))
        return int(float(line.split()[-1]))

    def freeze(self) -> None:
        """Let all of its processes stand still: it takes requests and answers none."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """End all of its processes at once, as a crash does."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ask it to end, and see to it."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()
