"""Trainers in processes of their own, which take a step when they are told to, and the samples they train on.

The peers:

hf            transformers' Trainer and PEFT, on padded batches
trl           TRL's SFTTrainer with packing (rows of 1,024 tokens)
lory          the samples of hf's batch in one row
lory-default  the same with torch's default path for fp32 products
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW_TOKENS = 1024
# the least of a sample, in tokens
SHORTEST = 8
COMMANDS = {
    "hf": ["benchmarks.peers.train_hf"],
    "trl": ["benchmarks.peers.train_hf", "--trl"],
    "lory": ["benchmarks.peers.train_lory"],
    "lory-default": ["benchmarks.peers.train_lory", "--no-onednn"],
}
Row = dict[str, list[int]]


class WorkerEnded(Exception):
    """A trainer's process ended by itself."""


def read_samples(data: str, seed: int = 0, longest: int = ROW_TOKENS) -> list[Row]:
    """All samples of a source in random order, as lory encodes them; `data` is as in data.train."""
    from lory.data.mixture.dataset import DataConfig, build_dataset
    from lory.models.load import load_generation_config, load_tokenizer, terminators
    from lory.models.resolve import resolve

    resolved = resolve("smollm2")
    tokenizer = load_tokenizer(resolved)
    config = DataConfig.model_validate(
        {"train": [{"path": data}], "max_tokens": longest, "duplicates": "drop", "cache": False, "workers": 1}
    )
    samples = build_dataset(config, tokenizer, terminators(load_generation_config(resolved), tokenizer), seed).train
    order = [index for index in range(len(samples)) if len(samples[index]) >= SHORTEST]
    random.Random(seed).shuffle(order)
    chosen = (samples[index] for index in order)
    return [{"input_ids": list(sample.input_ids), "labels": list(sample.labels)} for sample in chosen]


def join_samples(samples: list[Row], longest: int = ROW_TOKENS) -> list[Row]:
    """Samples one after the other in one, as long as that stays within `longest` tokens."""
    rows: list[Row] = []
    for sample in samples:
        if rows and len(rows[-1]["input_ids"]) + len(sample["input_ids"]) <= longest:
            rows[-1] = {key: rows[-1][key] + sample[key] for key in sample}
        else:
            rows.append(sample)
    return rows[:-1]


def cut_rows(samples: list[Row], length: int, count: int) -> list[Row]:
    """`count` rows of `length` tokens each, out of samples one after the other, from the beginning again if need be."""
    stream: Row = {"input_ids": [], "labels": []}
    for sample in itertools.cycle(samples):
        stream = {key: stream[key] + sample[key] for key in sample}
        if len(stream["input_ids"]) >= length * count:
            break
    return [{key: stream[key][i * length : (i + 1) * length] for key in stream} for i in range(count)]


@contextlib.contextmanager
def write_job(samples: list[Row], batch: int, targets: str, limit_bytes: int | None = None) -> Iterator[Path]:
    """A file that tells trainers what to train on (see `benchmarks.peers.turns`)."""
    from lory.models.embedded import prepare_smollm2

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        job = {"model": str(prepare_smollm2()), "targets": targets, "samples": samples, "batch": batch}
        path.write_text(json.dumps(job | {"limit_bytes": limit_bytes, "folder": folder}), encoding="utf-8")
        yield path


def choose_pythons(peer_python: str | None, onednn: bool = True) -> dict[str, str]:
    """Which Python runs which peer; lory comes last."""
    pythons = {"hf": peer_python or sys.executable}
    if peer_python and subprocess.run([peer_python, "-c", "import trl"], capture_output=True).returncode == 0:
        pythons["trl"] = peer_python
    pythons["lory" if onednn else "lory-default"] = sys.executable
    return pythons


def find_versions(python: str) -> dict[str, str]:
    """Versions of what matters to a training step, where it is installed."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "names = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "wanted = ('torch', 'transformers', 'accelerate', 'peft', 'trl')\n"
        "print(json.dumps({n: names[n] for n in wanted if n in names} | {'python': sys.version.split()[0]}))"
    )
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", code], text=True))
    return found


class Worker:
    """A trainer in a process of its own, which can be used as a context."""

    def __init__(self, peer: str, python: str, job: Path, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        # waiting passively makes two threads little faster than one
        environment.pop("OMP_WAIT_POLICY", None)
        module, *options = COMMANDS[peer]
        self.peer = peer
        self.process = subprocess.Popen(
            [python, "-m", module, str(job), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self.steps: list[dict[str, float]] = []

    def start(self) -> float:
        """Wait until it is ready; returns its peak memory up to now."""
        peak = self._read()["peak_bytes"]
        self._pause()
        return peak

    def step(self) -> dict[str, float]:
        """Have it take a step; returns seconds, cpu_seconds, tokens, supervised, loss and peak_bytes."""
        assert self.process.stdin
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(self._read())
        self._pause()
        return self.steps[-1]

    def _pause(self) -> None:
        """Stop it until its next turn: threads that spin would take the core from the process whose turn it is."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _read(self) -> dict[str, float]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("@"):
                answer: dict[str, float] = json.loads(line[1:])
                return answer
        raise WorkerEnded(f"'{self.peer}' ended with code {self.process.wait()}; its message stands above.")

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
