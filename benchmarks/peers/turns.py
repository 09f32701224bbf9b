"""What the trainers of `benchmarks.workers` share: their job, taking turns, and starting from the same numbers.

A trainer is told its job by a JSON file:

model         folder of the base model
targets       a key of `ADAPTERS`
samples       the rows, each with `input_ids` and `labels`
batch         samples a step
limit_bytes   memory the process may have for its data, or null
folder        where it may leave files
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

RATE, MAX_NORM = 2e-4, 1.0
PAD, IGNORE = 2, -100
ADAPTERS: dict[str, tuple[int, int, Any]] = {"qv": (8, 16, ["q_proj", "v_proj"]), "all": (16, 32, "all-linear")}


def read_job(path: str) -> dict[str, Any]:
    """The job, its limit on memory in force."""
    job: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    if limit := job["limit_bytes"]:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return job


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


class Clock:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Seconds, as `say` takes them."""
        return {"seconds": time.perf_counter() - self.start, "cpu_seconds": time.process_time() - self.cpu}
