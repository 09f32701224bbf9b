"""Interrupted is uninterrupted: runs that are killed, resumed, or refused, and checkpoints that are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lory.models.resolve import list_checkpoints
from lory.runtime import LoryError, UsageError
from lory.training import checkpoint
from lory.training.checkpoint import check_manifest, point_link
from lory.training.loop import Loop
from lory.training.run import train

STEP_NUMBERS = ("loss", "learning_rate", "grad_norm", "token_accuracy", "supervised_tokens")

# Trains in a child process that kills itself, with SIGKILL, at a given call into lory: anywhere between two lines of
# the loop, of a save, of a log, as a power cut would have it. Counting calls makes the moments repeatable and spreads
# them over short and long functions alike. Without a number it trains to the end. Imports are made once, then forked.
KILLED = textwrap.dedent(
    """
    import json, os, signal, sys

    import lory.training.run as run

    def count_and_kill(limit):
        count = 0
        def note(frame, event, argument):
            nonlocal count
            if "/lory/training/" in frame.f_code.co_filename or "/lory/runtime" in frame.f_code.co_filename:
                count += 1
                if count == limit:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(note)
        return lambda: count

    def attempt(config, limit):
        ours, theirs = os.pipe()
        if (pid := os.fork()) == 0:
            sys.stderr = open(os.devnull, "w")
            counted = count_and_kill(limit)
            try:
                started = list(run.Path(config["output"]).glob("v*/config.yaml"))
                result = run.train(config, resume="last" if started else None)
                os.write(theirs, json.dumps([counted(), str(result.folder)]).encode())
                os._exit(0)
            except BaseException as error:
                os.write(theirs, json.dumps([0, repr(error)]).encode())
                os._exit(1)
        os.close(theirs)
        status = os.waitpid(pid, 0)[1]
        with os.fdopen(ours) as file:
            said = file.read()
        return (json.loads(said) if said else [None, None]), status

    run.plot_runs = lambda *arguments: None
    config, limits = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    import torch.utils.tensorboard
    run.load_model(run.prepare(run.build(run.Config, config, "config")).resolved)  # what is imported late is imported now
    for limit in limits:
        (count, said), status = attempt(config, limit)
        if os.WIFEXITED(status):
            break
    else:
        (count, said), status = attempt(config, 0)
    print(json.dumps({"calls": count, "said": said, "failed": status != 0}))
    """
)


def train_killed(config: dict[str, Any], calls: list[int]) -> dict[str, Any]:
    """Train in processes that are killed after so many calls each, one after the other, and at last to the end."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(config), json.dumps(calls)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert not result["failed"], result["said"]
    return result


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_numbers(run: Path) -> list[Any]:
    """What log.jsonl says, without what depends on the clock and the machine."""
    return [
        (entry["step"], entry["eval"] if "eval" in entry else [entry[name] for name in STEP_NUMBERS])
        for entry in read_lines(run / "log.jsonl")
    ]


def read_files(run: Path) -> dict[str, bytes | str]:
    """The checkpoints of a run, byte by byte, its links, and anything that should not have been left behind."""
    found: dict[str, bytes | str] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file() and name.startswith(("checkpoint-", ".checkpoint-")):
            found[name] = path.read_bytes()
    return found
