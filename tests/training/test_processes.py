"""Two processes learn what one learns from the same rows, and their run, resumed, is the uninterrupted one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lory.training.run import train

# What each of torchrun's processes does: the run of a config, which may die before a step.
RANK = """
import json, os, sys

import lory.training.run as run
from lory.training.loop import Loop

config, stop_before, resume = json.loads(sys.argv[1])
take_step = Loop._take_step

def take(loop, position):
    if position.step == stop_before:
        os._exit(3)
    return take_step(loop, position)

Loop._take_step = take
run.plot_runs = lambda *_: []
run.train(config, resume=resume)
"""


def run_ranks(script: Path, config: dict[str, Any], stop_before: int | None = None, resume: str | None = None) -> int:
    """The exit code of torchrun with two processes."""
    script.write_text(RANK, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run([*command, json.dumps([config, stop_before, resume])], timeout=300).returncode


def read_weights(output: str) -> dict[str, torch.Tensor]:
    [folder] = Path(output).glob("v*/last")
    return load_file(folder / "adapter_model.safetensors")


def read_losses(output: str) -> list[float]:
    [log] = Path(output).glob("v*/log.jsonl")
    return [entry["loss"] for line in log.read_text().splitlines() if "loss" in (entry := json.loads(line))]


@pytest.mark.slow
def test_two_processes_learn_what_one_does_and_resumed_is_uninterrupted(quick: dict[str, Any], tmp_path: Path) -> None:
    quick["train"] |= {"optimizer": "muon", "epochs": 4, "max_steps": 8}
    quick["adapter"]["dropout"] = 0.0
    alone, whole, killed = (str(tmp_path / name) for name in ("alone", "whole", "killed"))
    train(quick | {"output": alone})
    shared = quick | {"train": quick["train"] | {"accumulate": 1}}
    script = tmp_path / "rank.py"
    assert run_ranks(script, shared | {"output": whole}) == 0
    assert run_ranks(script, shared | {"output": killed}, stop_before=5) != 0
    assert run_ranks(script, shared | {"output": killed}, resume="last") == 0
    one, two, resumed = (read_weights(output) for output in (alone, whole, killed))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)
    assert read_losses(whole) == pytest.approx(read_losses(alone), rel=1e-4)
    assert all(torch.equal(resumed[name], weight) for name, weight in two.items())
    assert read_losses(killed) == read_losses(whole)
