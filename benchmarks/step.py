"""Whole LoRA training steps on SmolLM2: lory, HF Trainer with PEFT, and TRL's packed SFTTrainer, on the same samples.

    python -m benchmarks.step [--targets qv|all] [--threads 1,2] [--no-onednn] [--records short|long] [--rounds 5]
                              [--data FILE] [--peer-python PATH] [--json]

Each trains in a process of its own, whose peak memory is its own; they take turns, a step each, in an order that turns,
so that a slow moment of the machine hits all alike. What counts is tokens per second, real ones without padding, as
ratios within a round; those of the CPU time bear other load on the machine better. The peers:

hf    transformers' Trainer and PEFT: batches of 4 samples in random order, padded to the longest
trl   TRL's SFTTrainer with packing (rows of 1,024 tokens), if PATH, a Python, has trl and peft installed
lory  the 4 samples of hf's batch in one row; --no-onednn leaves torch's default path for fp32 products
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH, ROW_TOKENS, RATE, MAX_NORM = 4, 1024, 2e-4, 1.0
ADAPTERS: dict[str, tuple[int, int, Any]] = {"qv": (8, 16, ["q_proj", "v_proj"]), "all": (16, 32, "all-linear")}
PAD, IGNORE = 2, -100
# shortest and longest sample, in tokens
LENGTHS = {"short": (8, ROW_TOKENS), "long": (400, ROW_TOKENS)}
Row = dict[str, list[int]]


def draw_samples(data: str, records: str, count: int, seed: int) -> list[Row]:
    """`count` samples of a source in random order, as lory encodes them."""
    from lory.data.dataset import DataConfig, build_dataset
    from lory.models.load import load_generation_config, load_tokenizer, terminators
    from lory.models.resolve import resolve

    resolved = resolve("smollm2")
    tokenizer = load_tokenizer(resolved)
    config = DataConfig.model_validate(
        {"train": [{"path": data}], "max_tokens": ROW_TOKENS, "duplicates": "drop", "cache": False, "workers": 1}
    )
    samples = build_dataset(config, tokenizer, terminators(load_generation_config(resolved), tokenizer), seed).train
    shortest, longest = LENGTHS[records]
    fitting = [index for index in range(len(samples)) if shortest <= len(samples[index]) <= longest]
    random.Random(seed).shuffle(fitting)
    if len(fitting) < count:
        raise SystemExit(f"{data} has {len(fitting)} samples of {shortest} to {longest} tokens; {count} are needed.")
    chosen = [samples[index] for index in fitting[:count]]
    return [{"input_ids": list(s.input_ids), "labels": list(s.labels)} for s in chosen]


def start_alike(model: Any) -> None:
    """Fill A and B with the same numbers, whatever the library calls them; B is not zero, so that all of it works."""
    import torch

    generator = torch.Generator().manual_seed(0)
    # both libraries keep the model's order, with A before B
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)


def wait_for_turn() -> None:
    """Return when the other side wants a step."""
    if not sys.stdin.readline():
        raise SystemExit(0)


def say(**values: Any) -> None:
    """A line of JSON, with the peak memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print("@" + json.dumps(values | {"peak_bytes": peak}), flush=True)


def count_tokens(labels: Any, attention_mask: Any) -> tuple[int, int]:
    """Real and supervised tokens of a batch."""
    real = labels.numel() if attention_mask is None else int(attention_mask.sum())
    return real, int((labels != IGNORE).sum())


def serve_trainer(job: dict[str, Any], packed: bool) -> None:
    """Train with HF's Trainer, or TRL's, which wait for their turn before each step."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32")
    rank, alpha, targets = ADAPTERS[job["targets"]]
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings)
    start_alike(model)
    arguments: dict[str, Any] = {
        "output_dir": job["folder"],
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_NORM,
        "num_train_epochs": 100,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1_000_000,
        "gradient_checkpointing": False,
    }
    base, given = _trl_parts(job, arguments) if packed else _hf_parts(job, arguments)
    seen: dict[str, Any] = {}

    class Timed(base):  # type: ignore[misc, valid-type]
        """Notes each batch's loss and tokens."""

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            labels = inputs["labels"]
            seen["tokens"], seen["supervised"] = count_tokens(labels, inputs.get("attention_mask"))
            result = super().compute_loss(model, inputs, *rest, **named)
            seen["loss"] = float((result[0] if isinstance(result, tuple) else result).detach())
            return result

    class Turns(transformers.TrainerCallback):  # type: ignore[misc]
        """A step for each line of standard input."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait_for_turn()
            seen["start"], seen["cpu"] = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            start, cpu = seen.pop("start"), seen.pop("cpu")
            say(seconds=time.perf_counter() - start, cpu_seconds=time.process_time() - cpu, **seen)

    trainer = Timed(model=model, callbacks=[Turns()], **given)
    say()
    trainer.train()


def _hf_parts(job: dict[str, Any], arguments: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    import torch
    import transformers

    def pad(rows: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    def collate(samples: list[Row]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": pad([s["input_ids"] for s in samples], PAD),
            "labels": pad([s["labels"] for s in samples], IGNORE),
            "attention_mask": pad([[1] * len(s["input_ids"]) for s in samples], 0),
        }

    class InOrder(transformers.Trainer):
        """The samples are shuffled already."""

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    config = transformers.TrainingArguments(per_device_train_batch_size=BATCH, **arguments)
    return InOrder, {"args": config, "train_dataset": job["samples"], "data_collator": collate}


def _trl_parts(job: dict[str, Any], arguments: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    import datasets
    import transformers
    import trl

    config = trl.SFTConfig(
        per_device_train_batch_size=1, packing=True, max_length=ROW_TOKENS, shuffle_dataset=False, **arguments
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    data = datasets.Dataset.from_list(job["samples"])
    return trl.SFTTrainer, {"args": config, "train_dataset": data, "processing_class": tokenizer}


def serve_lory(job: dict[str, Any], onednn: bool) -> None:
    """Train as `lory train` does."""
    import torch
    from accelerate import Accelerator

    from lory.adapters.inject import AdapterConfig, attach_lora
    from lory.data.collate import collate
    from lory.models.fused_memory import keep_freed_memory
    from lory.models.load import load_model
    from lory.models.matmul import choose_fp32_matmul
    from lory.models.resolve import resolve
    from lory.training.optim import TrainConfig, build_optimizer
    from lory.training.step import Objective, train_step
    from lory.types import Sample

    keep_freed_memory()
    if onednn:
        choose_fp32_matmul(torch.device("cpu"))
    model = load_model(resolve("smollm2"), "float32", torch.device("cpu"))
    rank, alpha, targets = ADAPTERS[job["targets"]]
    attach_lora(model, AdapterConfig(rank=rank, alpha=alpha, targets=targets))
    start_alike(model)
    objective = Objective(model).train()
    optimizer = build_optimizer(model, TrainConfig(learning_rate=RATE))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    accelerator = Accelerator(cpu=True)
    samples = [Sample(tuple(s["input_ids"]), tuple(s["labels"])) for s in job["samples"]]
    say()
    at = 0
    while True:
        wait_for_turn()
        start, cpu = time.perf_counter(), time.process_time()
        batch = collate(samples[at : at + BATCH])
        result = train_step(objective, [batch], optimizer, schedule, accelerator, MAX_NORM)
        spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        say(**spent, loss=result.loss, tokens=result.tokens, supervised=result.supervised_tokens)
        at = (at + BATCH) % len(samples)


class Worker:
    """A peer in a process of its own."""

    def __init__(self, peer: str, python: str, job: Path, threads: int) -> None:
        # spinning threads would take the core from the process whose turn it is
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        environment["HF_HUB_OFFLINE"] = "1"
        command = [python, str(Path(__file__).resolve()), "--serve", peer, "--job", str(job)]
        self.peer = peer
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.start = self._read()["peak_bytes"]
        self.steps: list[dict[str, float]] = []

    def step(self) -> None:
        """Have it take a step."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(self._read())

    def _read(self) -> dict[str, float]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("@"):
                answer: dict[str, float] = json.loads(line[1:])
                return answer
        raise SystemExit(f"'{self.peer}' ended with code {self.process.wait()}; its message stands above.")

    def close(self) -> None:
        """Let it end."""
        self.process.kill()
        self.process.wait()

    def describe(self) -> dict[str, Any]:
        """Figures of all steps but the first, which warms up."""
        timed = self.steps[1:]
        seconds = sum(step["seconds"] for step in timed)
        return {
            "seconds": statistics.median(step["seconds"] for step in timed),
            "tokens_per_second": sum(step["tokens"] for step in timed) / seconds,
            "supervised_per_second": sum(step["supervised"] for step in timed) / seconds,
            "start_bytes": self.start,
            "peak_bytes": self.steps[-1]["peak_bytes"],
            "losses": [step["loss"] for step in self.steps],
        }


def compare(workers: list[Worker], clock: str) -> dict[str, dict[str, float]]:
    """Median, least and largest of lory's tokens a second over each peer's, round by round."""
    *others, ours = [(w.peer, [step["tokens"] / step[clock] for step in w.steps[1:]]) for w in workers]
    result = {}
    for peer, speeds in others:
        ratios = [a / b for a, b in zip(ours[1], speeds, strict=True)]
        result[peer] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return result


def run_threads(job: Path, threads: int, rounds: int, pythons: dict[str, str]) -> dict[str, Any]:
    """All peers at one number of threads."""
    workers = [Worker(peer, python, job, threads) for peer, python in pythons.items()]
    try:
        for turn in range(rounds + 1):
            for place in range(len(workers)):
                workers[(turn + place) % len(workers)].step()
    finally:
        for worker in workers:
            worker.close()
    ours = workers[-1]
    peers = {worker.peer: worker.describe() for worker in workers}
    ratios = compare(workers, "seconds")
    return {
        "threads": threads,
        "peers": peers,
        "speed_ratio": ratios,
        "cpu_ratio": compare(workers, "cpu_seconds"),
        "memory_ratio": {peer: peers[ours.peer]["peak_bytes"] / peers[peer]["peak_bytes"] for peer in ratios},
        "first_loss_difference": abs(ours.steps[0]["loss"] - workers[0].steps[0]["loss"]),
    }


def print_table(result: dict[str, Any]) -> None:
    """A line for each peer."""
    print(f"{result['threads']} threads; loss of the first step differs by {result['first_loss_difference']:.1e}")
    head = f"  {'':<14} {'s a step':>9} {'tokens/s':>9} {'learnt/s':>9} {'peak MB':>9}"
    print(f"{head}   lory's speed over it, by CPU time, memory")
    for peer, values in result["peers"].items():
        row = f"  {peer:<14} {values['seconds']:9.2f} {values['tokens_per_second']:9.1f} "
        row += f"{values['supervised_per_second']:9.1f} {values['peak_bytes'] / 1e6:9.0f}"
        if ratio := result["speed_ratio"].get(peer):
            row += f"   {ratio['median']:5.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})   "
            row += f"{result['cpu_ratio'][peer]['median']:5.2f}   {result['memory_ratio'][peer]:.2f}"
        print(row)


def choose_pythons(peer_python: str | None, onednn: bool) -> dict[str, str]:
    """Which Python runs which peer; lory comes last."""
    pythons = {"hf": peer_python or sys.executable}
    if peer_python and subprocess.run([peer_python, "-c", "import trl"], capture_output=True).returncode == 0:
        pythons["trl"] = peer_python
    pythons["lory" if onednn else "lory-default"] = sys.executable
    return pythons


def main() -> None:
    """Run all numbers of threads and print tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", choices=ADAPTERS, default="qv", help="q and v with rank 8, or all with rank 16")
    parser.add_argument("--threads", default="1", help="numbers of threads, as in 1,2")
    parser.add_argument("--no-onednn", action="store_true")
    parser.add_argument("--records", choices=LENGTHS, default="short", help="short: up to 1,024 tokens; long: from 400")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the samples' order")
    parser.add_argument("--data", default="general", help="a source, as in data.train")
    parser.add_argument("--peer-python", help="a Python that has trl, peft and accelerate")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        job = json.loads(Path(arguments.job).read_text(encoding="utf-8"))
        if arguments.serve in ("hf", "trl"):
            serve_trainer(job, packed=arguments.serve == "trl")
        else:
            serve_lory(job, onednn=arguments.serve == "lory")
        return
    from lory.models.embedded import prepare_smollm2

    samples = draw_samples(arguments.data, arguments.records, BATCH * (arguments.rounds + 1), arguments.seed)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        job = {"model": str(prepare_smollm2()), "targets": arguments.targets, "folder": folder, "samples": samples}
        path.write_text(json.dumps(job), encoding="utf-8")
        pythons = choose_pythons(arguments.peer_python, not arguments.no_onednn)
        for threads in (int(number) for number in arguments.threads.split(",")):
            results.append(run_threads(path, threads, arguments.rounds, pythons))
            if not arguments.json:
                print_table(results[-1])
    if arguments.json:
        print(json.dumps({"targets": arguments.targets, "records": arguments.records, "runs": results}))


if __name__ == "__main__":
    main()
