"""Tokens per second of greedy decoding on a CPU: transformers' `generate`, lory, and lory with int8 weights.

Each peer is a process of its own with SmolLM2, and they take turns round by round, so that what else the machine does
meets all of them. Prompts are questions of different lengths, padded on the left where there are several; every answer
has the same number of tokens. It is told whether lory's tokens are transformers', and what int8 changes: the share of
tokens that stay the same when each is predicted after the same text, and the loss on that text.

    python -m benchmarks.decode [--threads 2] [--batch 1,8] [--tokens 64] [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PEERS = ("transformers", "lory", "lory int8")
QUESTIONS = (
    "Tell me a story about the sea, please.",
    "Who are you?",
    "What is the difference between a list and a tuple in Python, and when should I use which of them?",
    "Name three birds that live near rivers.",
    "Why is the sky blue?",
    "Write a short letter to a friend who has moved to another town, and ask about the new house.",
    "How do I bake bread?",
    "Explain in simple words what a neural network is.",
)
TEXT = Path(__file__).parents[1] / "docs" / "decisions.md"
TEXT_TOKENS = 512


class Peer:
    """One model, set up as `name` says, that answers batches of questions."""

    def __init__(self, name: str, threads: int) -> None:
        import torch

        from lory.models.lean import prepare_for_decoding
        from lory.models.load import load_model, load_tokenizer
        from lory.models.resolve import resolve

        torch.set_num_threads(threads)
        self.name, resolved = name, resolve("smollm2")
        self.model, self.tokenizer = load_model(resolved), load_tokenizer(resolved)
        if name != "transformers":
            prepare_for_decoding(self.model, int8=name == "lory int8")

    def answer(self, batch: int, tokens: int) -> dict[str, Any]:
        """The seconds that `batch` answers of `tokens` tokens take, the prompts' included, and the answers."""
        from lory.data.encoding.templates import render_prompt
        from lory.types import Message

        questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(batch)]
        prompts = [render_prompt(self.tokenizer, [Message("user", question)]) for question in questions]
        started = time.perf_counter()
        answers = self._generate(prompts, tokens)
        return {"seconds": time.perf_counter() - started, "answers": answers}

    def _generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        import torch

        from lory.generate import GenerationOptions, generate_batch

        if self.name != "transformers":
            # an id that there is not: answers of equal length
            end = (self.model.config.vocab_size,)
            return generate_batch(self.model, prompts, GenerationOptions(max_new_tokens=tokens), end)
        inputs = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        end = {"eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **end)
        answers: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
        return answers

    def read(self) -> dict[str, Any]:
        """The loss on a text, in nats a token, and the token predicted after each."""
        import torch

        ids = torch.tensor([self.tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"][:TEXT_TOKENS]])
        with torch.inference_mode():
            logits = self.model(ids).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        return {"loss": float(loss), "predicted": logits.argmax(dim=-1).tolist()}


class Worker:
    """A peer in a process of its own."""

    def __init__(self, name: str, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.decode", "--serve", name, "--threads", str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        # a token is hundreds of short operations: threads that sleep in between come late to each
        environment.pop("OMP_WAIT_POLICY", None)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **question: int) -> dict[str, Any]:
        """What the peer says to `answer`'s arguments, or, without any, `read`s."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"A peer ended with code {self.process.wait()}; its message stands above.")
        said: dict[str, Any] = json.loads(line)
        return said

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()


def serve(name: str, threads: int) -> None:
    """Answer what comes on standard input, until it ends."""
    peer = Peer(name, threads)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(peer.answer(**question) if question else peer.read()), flush=True)


def measure(workers: dict[str, Worker], batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """One size of batch: tokens a second, lory's speed over transformers' round by round, and the tokens compared."""
    said: dict[str, list[dict[str, Any]]] = {name: [] for name in PEERS}
    # the first round warms up
    for turn in range(rounds + 1):
        for place in range(len(PEERS)):
            name = PEERS[(turn + place) % len(PEERS)]
            said[name].append(workers[name].ask(batch=batch, tokens=tokens))
    seconds = {name: [one["seconds"] for one in given[1:]] for name, given in said.items()}
    answers = {name: given[0]["answers"] for name, given in said.items()}
    speedups = {
        name: [a / b for a, b in zip(seconds[PEERS[0]], seconds[name], strict=True)] for name in PEERS[1:]
    }  # fmt: skip
    return {
        "batch": batch,
        "tokens_per_second": {name: batch * tokens / statistics.median(times) for name, times in seconds.items()},
        "speedup": {
            name: {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
            for name, ratios in speedups.items()
        },
        "same_tokens": answers["lory"] == answers["transformers"],
    }


def compare(workers: dict[str, Worker]) -> dict[str, float]:
    """What int8 changes on a text."""
    full, few = (workers[name].ask() for name in PEERS[1:])
    same = [a == b for a, b in zip(full["predicted"], few["predicted"], strict=True)]
    return {
        "loss": full["loss"],
        "loss_int8": few["loss"],
        "loss_change": few["loss"] / full["loss"] - 1,
        "same_predictions": sum(same) / len(same),
    }


def print_result(result: dict[str, Any]) -> None:
    """A table for each size of batch."""
    for run in result["runs"]:
        same = "the same tokens" if run["same_tokens"] else "OTHER TOKENS"
        print(f"{result['threads']} threads, batch {run['batch']}, {result['tokens']} tokens each: {same}")
        for name in PEERS:
            row = f"  {name:<13}{run['tokens_per_second'][name]:8.1f} tokens/s"
            if name in run["speedup"]:
                ratio = run["speedup"][name]
                row += f"{ratio['median']:8.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"
            print(row)
    change = result["int8"]
    print(
        f"int8: loss {change['loss']:.4f} to {change['loss_int8']:.4f} ({change['loss_change']:+.2%}), "
        f"{change['same_predictions']:.1%} of predictions the same"
    )


def main() -> None:
    """Run all sizes of batch and print tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", default="1,8", help="sizes, with commas between them")
    parser.add_argument("--tokens", type=int, default=64, help="length of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.threads)
        return
    workers = {name: Worker(name, arguments.threads) for name in PEERS}
    sizes = [int(size) for size in arguments.batch.split(",")]
    result = {"threads": arguments.threads, "tokens": arguments.tokens}
    result["runs"] = [measure(workers, size, arguments.tokens, arguments.rounds) for size in sizes]
    result["int8"] = compare(workers)
    for worker in workers.values():
        worker.close()
    if arguments.json:
        import torch
        import transformers

        versions = {module.__name__: module.__version__ for module in (torch, transformers)}
        print(json.dumps({**versions, **result}))
    else:
        print_result(result)


if __name__ == "__main__":
    main()
