"""`lory demo`: the embedded model gets a new name and a new author on a CPU, in minutes."""

from __future__ import annotations

import json
import shlex
import textwrap
from pathlib import Path

from lory.training.config import read_config
from lory.training.monitor import read_log
from lory.training.run import RunResult, train

CONFIG = "assistant"


def run_demo(name: str, author: str, output: Path) -> RunResult:
    """Train the bundled config with this name and author."""
    config, _ = read_config(CONFIG)
    sources = [
        source.model_copy(update={"name": name, "author": author}) if source.path == "identity" else source
        for source in config.data.train
    ]
    data = config.data.model_copy(update={"train": sources})
    return train(config.model_copy(update={"data": data, "output": str(output)}))


def describe_demo(run: Path, output: Path) -> str:
    """What the run in `output` achieved, and what to try next."""
    return f"""
{_compare_answers(run)}

{_compare_losses(run)}
The curves:       {run / "plots" / "loss.png"}
Talk to it:       lory chat {shlex.quote(str(output))}
Merge it:         lory merge {shlex.quote(str(output))} out/model
Make it your own: lory configs copy {CONFIG} . && lory train {CONFIG}.yaml"""


def _compare_answers(folder: Path) -> str:
    """The sample prompts with their first and last answers."""
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    answers: dict[str, list[str]] = {}
    for sample in map(json.loads, lines):
        answers.setdefault(sample["prompt"], []).append(" ".join(sample["answer"].split()))
    parts = [
        f"> {prompt}\n  before: {textwrap.shorten(said[0], 160)}\n  after:  {said[-1]}"
        for prompt, said in answers.items()
    ]
    return "\n".join(parts)


def _compare_losses(folder: Path) -> str:
    """Held-out losses before and after, by source."""
    evals = [line["eval"]["sources"] for line in read_log(folder) if "eval" in line]
    first, last = evals[0], evals[-1]
    lines = [f"  {source}: {first[source]['loss']:.3f} before, {last[source]['loss']:.3f} after" for source in first]
    return "Loss on held-out records:\n" + "\n".join(lines)
