"""`lory demo`: the embedded model gets a new name and a new author on a CPU, in minutes."""

from __future__ import annotations

from pathlib import Path

from lory.training.config import read_config
from lory.training.monitor import read_log
from lory.training.run import RunResult, train

CONFIG = "assistant"


def run_demo(name: str, author: str, output: Path) -> RunResult:
    """Train the bundled config with this name and author, and say what to try next."""
    config, _ = read_config(CONFIG)
    sources = [
        source.model_copy(update={"name": name, "author": author}) if source.path == "identity" else source
        for source in config.data.train
    ]
    data = config.data.model_copy(update={"train": sources})
    result = train(config.model_copy(update={"data": data, "output": str(output)}))
    print(
        f"""
{_compare_losses(result.folder)}
The curves:       {result.folder / "plots" / "loss.png"}
Talk to it:       lory chat {output}
Merge it:         lory merge {output} out/model
Make it your own: lory configs copy {CONFIG} . && lory train {CONFIG}.yaml"""
    )
    return result


def _compare_losses(folder: Path) -> str:
    """Held-out losses before and after, by source."""
    evals = [line["eval"]["sources"] for line in read_log(folder) if "eval" in line]
    lines = [
        f"  {source}: {evals[0][source]['loss']:.3f} before, {evals[-1][source]['loss']:.3f} after"
        for source in evals[0]
    ]
    return "Loss on held-out records:\n" + "\n".join(lines)
