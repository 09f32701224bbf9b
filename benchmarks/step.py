"""Whole LoRA training steps on SmolLM2: lory, HF Trainer with PEFT, and TRL's packed SFTTrainer, on the same samples.

    python -m benchmarks.step [--targets qv|all] [--threads 1,2] [--no-onednn] [--records short|long] [--rounds 5]
                              [--data FILE] [--peer-python PATH] [--json]

Each trains in a process of its own, whose peak memory is its own; they take turns, a step each, in an order that turns,
so that a slow moment of the machine hits all alike. What counts is tokens per second, real ones without padding, as
ratios within a round; those of the CPU time bear other load on the machine better. The peers stand in
`benchmarks.workers`; trl is there if PATH, a Python, has it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.peers.turns import ADAPTERS
from benchmarks.workers import Worker, choose_pythons, find_versions, join_samples, read_samples, write_job

BATCH = 4


def describe(worker: Worker) -> dict[str, Any]:
    """Figures of all steps but the first, which warms up."""
    timed = worker.steps[1:]
    seconds = sum(step["seconds"] for step in timed)
    return {
        "seconds": statistics.median(step["seconds"] for step in timed),
        "tokens_per_second": sum(step["tokens"] for step in timed) / seconds,
        "supervised_per_second": sum(step["supervised"] for step in timed) / seconds,
        "peak_bytes": worker.steps[-1]["peak_bytes"],
        "losses": [step["loss"] for step in worker.steps],
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
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(peer, python, job, threads)) for peer, python in pythons.items()]
        for worker in workers:
            worker.start()
        for turn in range(rounds + 1):
            for place in range(len(workers)):
                workers[(turn + place) % len(workers)].step()
    ours = workers[-1]
    peers = {worker.peer: describe(worker) for worker in workers}
    ratios = compare(workers, "seconds")
    return {
        "threads": threads,
        "rounds": rounds,
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


def main() -> None:
    """Run all numbers of threads and print tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", choices=ADAPTERS, default="qv", help="q and v with rank 8, or all with rank 16")
    parser.add_argument("--threads", default="1", help="numbers of threads, as in 1,2")
    parser.add_argument("--no-onednn", action="store_true", help="torch's default path for lory's fp32 products, too")
    parser.add_argument(
        "--records", choices=("short", "long"), default="short", help="long: joined to samples of up to 1,024 tokens"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the samples' order")
    parser.add_argument("--data", default="general", help="a source, as in data.train")
    parser.add_argument("--peer-python", help="a Python that has trl, peft and accelerate")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    count = BATCH * (arguments.rounds + 1)
    samples = read_samples(arguments.data, arguments.seed)
    if arguments.records == "long":
        samples = join_samples(samples)
    if len(samples) < count:
        raise SystemExit(f"{arguments.data} gives {len(samples)} samples; {count} are needed: give a larger --data.")
    pythons = choose_pythons(arguments.peer_python, not arguments.no_onednn)
    runs = []
    with write_job(samples[:count], BATCH, arguments.targets) as job:
        for threads in (int(number) for number in arguments.threads.split(",")):
            runs.append(run_threads(job, threads, arguments.rounds, pythons))
            if not arguments.json:
                print_table(runs[-1])
    if arguments.json:
        told = {"targets": arguments.targets, "records": arguments.records, "data": Path(arguments.data).name}
        print(
            json.dumps(
                told | {"onednn": not arguments.no_onednn, "versions": find_versions(pythons["hf"]), "runs": runs}
            )
        )


if __name__ == "__main__":
    main()
