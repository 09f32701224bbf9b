"""Training as `lory train` does, a step at a time: JOB [--no-onednn]."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from benchmarks.peers.turns import ADAPTERS, MAX_NORM, RATE, Clock, read_job, say, start_alike, wait_for_turn

from lory.adapters.inject import AdapterConfig, attach_lora
from lory.data.mixture.collate import collate
from lory.models.fused_memory import keep_freed_memory
from lory.models.load import load_model
from lory.models.matmul import choose_fp32_matmul
from lory.models.resolve import resolve
from lory.training.objective import Objective
from lory.training.optim import TrainConfig, build_optimizer
from lory.training.step import train_step
from lory.types import Sample


def main(path: str, onednn: bool) -> None:
    """Train, a step for each line of standard input."""
    job = read_job(path)
    keep_freed_memory()
    if onednn:
        choose_fp32_matmul(torch.device("cpu"))
    model = load_model(resolve(job["model"]), "float32", torch.device("cpu"))
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
        clock = Clock()
        batch = collate(samples[at : at + job["batch"]])
        result = train_step(objective, [batch], optimizer, schedule, accelerator, MAX_NORM)
        spent = clock.read()
        say(**spent, loss=result.loss, tokens=result.tokens, supervised=result.supervised_tokens)
        at = (at + job["batch"]) % len(samples)


if __name__ == "__main__":
    main(sys.argv[1], onednn="--no-onednn" not in sys.argv)
