"""Tokens per second of `lory serve` with SmolLM2 on a CPU, over HTTP: one client, several, and several adapters.

The server is a process of its own, and so is transformers' `generate`, which answers the same questions without a
server; they take turns round by round, so that what else the machine does meets both. Every answer is greedy and has
the same number of tokens at most. With `--load`, 200 clients at a time ask for short answers afterwards, a third of
whom hang up, and the server's memory and places are looked at.

    python -m benchmarks.serve [--threads 1] [--clients 1,8] [--tokens 64] [--rounds 3] [--load SECONDS] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

QUESTIONS = (
    "Tell me a long story about the sea, please.",
    "Write an essay about the history of bread.",
    "What is the difference between a list and a tuple in Python? Explain it at length, with examples.",
    "Describe ten birds that live near rivers, each in a paragraph.",
    "Explain in detail why the sky is blue.",
    "Write a long letter to a friend who has moved to another town, and ask about the new house.",
    "How do I bake bread? Give me all of the steps.",
    "Explain at length what a neural network is.",
)
ADAPTERS = 8
SERVER = "import typer; from lory.cli.serve import serve; typer.run(serve)"


def make_adapters(folder: Path) -> list[str]:
    """Adapters of rank 16 on all linear layers, so small that answers keep their length; what --adapter takes."""
    import torch

    from lory.adapters.files import save_adapter
    from lory.adapters.inject import AdapterConfig, adapted_layers, attach_lora
    from lory.models.load import load_model
    from lory.models.resolve import resolve

    model = load_model(resolve("smollm2"))
    attach_lora(model, AdapterConfig(rank=16, alpha=16))
    arguments = []
    for number in range(ADAPTERS):
        with torch.no_grad():
            for _, layer in adapted_layers(model):
                layer.lora_A.normal_(std=0.01)
                # too small to change an answer, whose length would change the speed
                layer.lora_B.normal_(std=1e-6)
        own = folder / f"adapter-{number}"
        own.mkdir()
        save_adapter(model, own, "smollm2")
        arguments += ["--adapter", f"adapter-{number}={own}"]
    return arguments


class Server:
    """`lory serve` in a process."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        command = [sys.executable, "-c", SERVER, "smollm2", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        match = re.search(r"http://\S+", self.process.stdout.readline())
        if match is None:
            raise SystemExit("The server did not start.")
        self.url = match[0].removesuffix("/v1")

    def read_metric(self, name: str) -> float:
        """The value of a metric without labels."""
        import httpx

        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

    def read_memory(self) -> float:
        """What the process holds, in MB."""
        import psutil

        return float(psutil.Process(self.process.pid).memory_info().rss / 1e6)

    def measure(self, models: list[str], tokens: int, **more: Any) -> float:
        """Tokens per second of one client for each of `models`, all at a time; `more` are fields of the request."""

        async def ask_all() -> int:
            import httpx

            async with httpx.AsyncClient(timeout=600) as client:
                bodies = [ask(model, QUESTIONS[i % len(QUESTIONS)], tokens, **more) for i, model in enumerate(models)]
                answers = await asyncio.gather(
                    *(client.post(f"{self.url}/v1/chat/completions", json=body) for body in bodies)
                )
                return sum(answer.json()["usage"]["completion_tokens"] for answer in answers)

        started = time.perf_counter()
        count = asyncio.run(ask_all())
        return count / (time.perf_counter() - started)


def ask(model: str, question: str, tokens: int, **more: Any) -> dict[str, Any]:
    """The body of a request."""
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0} | more


class Transformers:
    """transformers' `generate` in a process."""

    def __init__(self, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.serve", "--peer"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def measure(self, tokens: int) -> float:
        """Tokens per second of one answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(tokens, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def run_transformers() -> None:
    """Answer the first question for each number of tokens on standard input, and print tokens per second."""
    import torch

    from lory.data.encoding.templates import render_prompt
    from lory.models.load import load_model, load_tokenizer
    from lory.models.resolve import resolve
    from lory.types import Message

    resolved = resolve("smollm2")
    model, tokenizer = load_model(resolved), load_tokenizer(resolved)
    prompt = torch.tensor([render_prompt(tokenizer, [Message("user", QUESTIONS[0])])])
    for line in sys.stdin:
        started = time.perf_counter()
        with torch.inference_mode():
            output: Any = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=int(line), do_sample=False
            )
        print((output.shape[1] - prompt.shape[1]) / (time.perf_counter() - started), flush=True)


async def crowd(url: str, clients: int, seconds: float) -> Counter[str]:
    """So many clients at a time, a third of whom hang up; how each request ended."""
    import httpx

    ended: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def keep_asking(number: int) -> None:
        turn = number
        while time.monotonic() < end:
            turn += 1
            # half of those who hang up do so while they wait
            timeout = 0.5 if turn % 6 == 0 else 120
            body = ask("smollm2", QUESTIONS[turn % len(QUESTIONS)], 8, stream=turn % 2 == 0)
            try:
                # no connection is kept, so hanging up is seen as such
                async with (
                    httpx.AsyncClient(timeout=timeout) as client,
                    client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer,
                ):
                    if answer.status_code == 200 and turn % 3 == 0:
                        await anext(answer.aiter_raw())
                        ended["hung up"] += 1
                        continue
                    await answer.aread()
                    ended[str(answer.status_code)] += 1
                    if answer.status_code == 429:
                        await asyncio.sleep(0.2)
            except httpx.TimeoutException:
                ended["hung up"] += 1
            except httpx.TransportError as error:
                ended[type(error).__name__] += 1

    await asyncio.gather(*(keep_asking(number) for number in range(clients)))
    return ended


def measure_load(server: Server, seconds: float) -> dict[str, Any]:
    """What 200 clients leave behind."""
    asyncio.run(crowd(server.url, 200, min(10.0, seconds)))
    before = server.read_memory()
    ended = asyncio.run(crowd(server.url, 200, seconds))
    time.sleep(2)
    left = {name: server.read_metric(f"lory_{name}") for name in ("running", "queue_length")}
    return {"ended": dict(ended), "left": left, "memory_mb": [round(before), round(server.read_memory())]}


def measure(server: Server, peer: Transformers, clients: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """Speeds in tokens per second: the median over the rounds, and the ratios round by round."""
    own = [f"adapter-{number}" for number in range(ADAPTERS)]
    speeds: dict[str, list[float]] = {}
    # the first round warms up
    for turn in range(rounds + 1):
        said = {"transformers": peer.measure(tokens)}
        said |= {f"{count} clients": server.measure(["smollm2"] * count, tokens) for count in clients}
        said["8 clients, one adapter"] = server.measure([own[0]] * 8, tokens)
        said["8 clients, 8 adapters"] = server.measure(own, tokens)
        said["1 client, contrastive search"] = server.measure(["smollm2"], tokens, penalty_alpha=0.9, top_k=4)
        for name, speed in said.items():
            speeds.setdefault(name, [])
            if turn:
                speeds[name].append(speed)

    def compare(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(speeds[one], speeds[other], strict=True))

    first, last = f"{clients[0]} clients", f"{clients[-1]} clients"
    return {
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "ratios": {
            f"{first} / transformers": compare(first, "transformers"),
            f"{last} / {first}": compare(last, first),
            "8 adapters / one adapter": compare("8 clients, 8 adapters", "8 clients, one adapter"),
        },
    }


def main() -> None:
    """Measure, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clients", default="1,8", help="numbers of clients, with commas between them")
    parser.add_argument("--tokens", type=int, default=64, help="length of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.0, metavar="SECONDS", help="200 clients for so long")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        run_transformers()
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("LORY_API_KEY", None)
    result: dict[str, Any] = {"threads": arguments.threads, "tokens": arguments.tokens}
    with tempfile.TemporaryDirectory() as folder:
        server, peer = Server(make_adapters(Path(folder)), environment), Transformers(environment)
        try:
            clients = [int(number) for number in arguments.clients.split(",")]
            result |= measure(server, peer, clients, arguments.tokens, arguments.rounds)
            if arguments.load:
                result["load"] = measure_load(server, arguments.load)
        finally:
            server.process.terminate()
            peer.process.kill()
            server.process.wait()
    if arguments.json:
        print(json.dumps(result))
        return
    for name, speed in result["tokens_per_second"].items():
        print(f"{name:<32}{speed:8.1f} tokens/s")
    for name, ratio in result["ratios"].items():
        print(f"{name:<34}{ratio:6.2f}")
    if "load" in result:
        print(json.dumps(result["load"]))


if __name__ == "__main__":
    main()
