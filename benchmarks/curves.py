"""The loss of 100 LoRA steps of SmolLM2: lory and transformers' Trainer with PEFT on the same batches.

    python -m benchmarks.curves [--steps 100] [--batch 2] [--longest 256] [--targets qv|all] [--data FILE]
                                [--peer-python PATH] [--picture docs/images/loss-curves.png] [--json]

Both start from the same adapter, with a constant learning rate of 2e-4. Samples come again once all have been seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.turns import ADAPTERS
from benchmarks.workers import Worker, find_versions, read_samples, write_job


def run_steps(job: Path, steps: int, threads: int, pythons: dict[str, str]) -> dict[str, list[float]]:
    """Each peer's losses, one after the other."""
    losses = {}
    for peer, python in pythons.items():
        with Worker(peer, python, job, threads) as worker:
            worker.start()
            losses[peer] = [worker.step()["loss"] for _ in range(steps)]
    return losses


def draw(losses: dict[str, list[float]], path: Path) -> None:
    """Both curves, and their difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    theirs, ours = losses["hf"], losses["lory"]
    steps = range(1, len(ours) + 1)
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7, 4.5), dpi=100, sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    above.plot(steps, theirs, color="#c44e52", linewidth=4, alpha=0.45, label="transformers' Trainer with PEFT")
    above.plot(steps, ours, color="#1f4e79", linewidth=1.2, label="lory")
    above.set_ylabel("loss of the batch (nats a token)")
    above.legend(frameon=False)
    below.semilogy(
        steps, [max(abs(a - b), 1e-9) for a, b in zip(theirs, ours, strict=True)], color="#555555", linewidth=1
    )
    below.set_ylabel("difference")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Train both and print the largest difference, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2, help="samples a step")
    parser.add_argument("--longest", type=int, default=256, help="samples of more tokens are left out")
    parser.add_argument("--targets", choices=ADAPTERS, default="qv")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="general", help="a source, as in data.train")
    parser.add_argument("--peer-python", help="a Python that has peft and accelerate")
    parser.add_argument("--picture", type=Path, help="a PNG to write")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    pythons = {"hf": arguments.peer_python or sys.executable, "lory": sys.executable}
    samples = read_samples(arguments.data, longest=arguments.longest)
    # whole batches, so that both begin anew at the same place
    samples = samples[: min(len(samples) // arguments.batch, arguments.steps) * arguments.batch]
    with write_job(samples, arguments.batch, arguments.targets) as job:
        losses = run_steps(job, arguments.steps, arguments.threads, pythons)
    differences = [abs(a - b) for a, b in zip(losses["hf"], losses["lory"], strict=True)]
    if arguments.picture:
        draw(losses, arguments.picture)
    result: dict[str, Any] = {
        "targets": arguments.targets,
        "data": Path(arguments.data).name,
        "versions": find_versions(pythons["hf"]),
        "losses": losses,
        "largest_difference": max(differences),
        "first_difference": differences[0],
    }
    if arguments.json:
        print(json.dumps(result))
        return
    first, last = losses["lory"][0], losses["lory"][-1]
    print(f"{arguments.steps} steps, loss {first:.3f} to {last:.3f}")
    print(f"the first step's losses differ by {differences[0]:.1e}, all by at most {max(differences):.1e}")


if __name__ == "__main__":
    main()
