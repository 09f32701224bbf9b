"""One whole SmolLM2 training step with LoRA on all linear layers: lory's packed row and PEFT's padded batch.

    python -m benchmarks.lora_step [--rounds 5] [--samples 4] [--threads 1 2] [--json]

Forward, backward, clipping and AdamW over the same samples, from the same adapters. Each peer lives in a process of its
own, whose peak memory is its own, and they take turns within each round, in an order that turns too, so that a slow
moment of the machine hits all alike; what counts are the ratios within a round. The peers:

peft        get_peft_model, the samples padded to the longest, transformers' own loss
peft+onednn the same with the fp32 products that lory chose for this CPU (`lory.models.matmul`)
lory        the samples in one row, kept apart, logits for the learnt positions only
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from lory.types import IGNORE, Sample

PEERS = ("peft", "peft+onednn", "lory")
RANK, ALPHA, RATE, MAX_NORM = 16, 32, 2e-4, 1.0
PAD = 2
Step = Callable[[], float]


def make_samples(count: int, seed: int) -> list[Sample]:
    """Random tokens in lengths as chats have them: log-normal about 130 tokens, the first two fifths a prompt."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (4.87 + 0.6 * torch.randn(count, generator=generator)).exp().clamp(24, 512).long().tolist()
    samples = []
    for length in lengths:
        ids = torch.randint(3, 49152, (length,), generator=generator).tolist()
        prompt = 2 * length // 5
        samples.append(Sample(tuple(ids), (IGNORE,) * prompt + tuple(ids[prompt:])))
    return samples


def start_alike(model: torch.nn.Module) -> None:
    """Fill A and B with the same numbers, whatever the library calls them; B is not zero, so that all of it works."""
    generator = torch.Generator().manual_seed(0)
    # both libraries keep the model's order, with A before B
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)


def build_peft(samples: list[Sample]) -> Step:
    """A step as PEFT's and transformers' users write it."""
    import peft
    from transformers import AutoModelForCausalLM

    from lory.models.embedded import prepare_smollm2

    base = AutoModelForCausalLM.from_pretrained(prepare_smollm2(), dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train()
    start_alike(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)

    def pad(rows: list[tuple[int, ...]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    def step() -> float:
        ids, labels = pad([s.input_ids for s in samples], PAD), pad([s.labels for s in samples], IGNORE)
        mask = pad([(1,) * len(s) for s in samples], 0)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def build_lory(samples: list[Sample]) -> Step:
    """A step as `lory train` takes it."""
    from accelerate import Accelerator

    from lory.adapters.inject import AdapterConfig, attach_lora
    from lory.data.collate import collate
    from lory.models.load import load_model
    from lory.models.resolve import resolve
    from lory.training.optim import TrainConfig, build_optimizer
    from lory.training.step import Objective, train_step

    model = load_model(resolve("smollm2"), "float32", torch.device("cpu"))
    attach_lora(model, AdapterConfig(rank=RANK, alpha=ALPHA))
    start_alike(model)
    objective = Objective(model).train()
    optimizer = build_optimizer(model, TrainConfig(learning_rate=RATE))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    accelerator = Accelerator(cpu=True)

    def step() -> float:
        return train_step(objective, [collate(samples)], optimizer, schedule, accelerator, MAX_NORM).loss

    return step


def serve(peer: str, samples: list[Sample]) -> None:
    """Take a step for each line of standard input, and answer with its seconds, loss and the peak memory in bytes."""
    from lory.models.fused_memory import keep_freed_memory
    from lory.models.matmul import choose_fp32_matmul

    if peer == "lory":
        keep_freed_memory()
    if peer != "peft":
        choose_fp32_matmul(torch.device("cpu"))
    step = build_lory(samples) if peer == "lory" else build_peft(samples)
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_bytes": peak}), flush=True)


class Worker:
    """A peer in a process of its own."""

    def __init__(self, peer: str, threads: int, count: int, seed: int) -> None:
        # spinning threads would take the core from the process whose turn it is
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        command = [sys.executable, "-m", "benchmarks.lora_step", "--serve", peer]
        command += ["--samples", str(count), "--seed", str(seed)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()

    def step(self) -> dict[str, float]:
        """Have it take a step."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"A peer ended with code {self.process.wait()}; its message stands above.")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end."""
        self.process.communicate()


def run_threads(threads: int, rounds: int, count: int, seed: int) -> dict[str, Any]:
    """All peers at one number of threads."""
    samples = make_samples(count, seed)
    lengths = [len(sample) for sample in samples]
    workers = {peer: Worker(peer, threads, count, seed) for peer in PEERS}
    answers: dict[str, list[dict[str, float]]] = {peer: [] for peer in PEERS}
    # the first round warms up; its losses count, its times don't
    for turn in range(rounds + 1):
        for place in range(len(PEERS)):
            peer = PEERS[(turn + place) % len(PEERS)]
            answers[peer].append(workers[peer].step())
    for worker in workers.values():
        worker.close()
    seconds = {peer: [answer["seconds"] for answer in given[1:]] for peer, given in answers.items()}
    losses = {peer: [answer["loss"] for answer in given] for peer, given in answers.items()}
    return {
        "threads": threads,
        "tokens": sum(lengths),
        "padded_tokens": count * max(lengths),
        "supervised_tokens": sum(sample.supervised for sample in samples),
        "seconds": {peer: statistics.median(times) for peer, times in seconds.items()},
        "tokens_per_second": {peer: sum(lengths) / statistics.median(times) for peer, times in seconds.items()},
        "peak_bytes": {peer: int(given[-1]["peak_bytes"]) for peer, given in answers.items()},
        "time_ratio": {other: summarize(seconds["lory"], seconds[other]) for other in PEERS[:-1]},
        "losses": losses["lory"],
        "largest_loss_difference": {
            other: max(abs(a - b) for a, b in zip(losses["lory"], losses[other], strict=True)) for other in PEERS[:-1]
        },
    }


def summarize(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median, least and largest of lory's time over the other's, round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def print_table(result: dict[str, Any]) -> None:
    """A line for each peer."""
    print(
        f"{result['threads']} threads, {result['tokens']} tokens ({result['padded_tokens']} padded, "
        f"{result['supervised_tokens']} learnt), loss {result['losses'][0]:.4f} to {result['losses'][-1]:.4f}"
    )
    print(f"  {'':<12} {'s a step':>9} {'tokens/s':>9} {'peak MB':>9}   lory's time over it     loss difference")
    for peer in PEERS:
        row = f"  {peer:<12} {result['seconds'][peer]:9.2f} {result['tokens_per_second'][peer]:9.1f} "
        row += f"{result['peak_bytes'][peer] / 1e6:9.0f}"
        if peer in result["time_ratio"]:
            ratio = result["time_ratio"][peer]
            row += f"   {ratio['median']:5.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
            row += f"     {result['largest_loss_difference'][peer]:.1e}"
        print(row)


def main() -> None:
    """Run all numbers of threads and print tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4, help="samples in a step; PEFT takes about 5 GB for 4, twice")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, make_samples(arguments.samples, arguments.seed))
        return
    results = []
    for threads in arguments.threads:
        results.append(run_threads(threads, arguments.rounds, arguments.samples, arguments.seed))
        if not arguments.json:
            print_table(results[-1])
    if arguments.json:
        import peft
        import transformers

        versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
        print(json.dumps({"rank": RANK, **versions, "runs": results}))


if __name__ == "__main__":
    main()
