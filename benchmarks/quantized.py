"""What a base in few bits costs: the same LoRA run of SmolLM2 over fp32, NF4 and int8, each merged into the fp32 base.

    python -m benchmarks.quantized [--steps 60] [--kinds fp32 nf4 nf4-pure int8] [--output runs/quantized] [--json]

Each kind is trained as `lory train` does, with the same data in the same order, and then merged as `lory merge` does,
its check against base plus adapter with it. What counts is the held-out loss over that of the fp32 run. Runs that
`--output` already has are gone on with, which takes no steps where they are done.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from lory.export import merge
from lory.models.load import load_model
from lory.models.quantize import count_bits
from lory.models.resolve import find_run, resolve
from lory.training.config import Config
from lory.training.monitor import read_log
from lory.training.run import train

KINDS = ("fp32", "nf4", "nf4-pure", "int8")


def make_config(kind: str, steps: int, output: Path) -> Config:
    """A LoRA on all linear layers, learning a name from the identity set and manners from the general one."""
    return Config.model_validate(
        {
            "model": {"path": "smollm2", "dtype": "float32", "quantize": None if kind == "fp32" else kind},
            "adapter": {"type": "lora", "rank": 16, "alpha": 32},
            "data": {
                "train": [{"path": "identity", "name": "Lory", "author": "the lory authors"}, {"path": "general"}],
                "eval_fraction": 0.06,
                "max_tokens": 512,
            },
            "train": {"max_steps": steps, "batch_size": 1, "learning_rate": 4e-4, "warmup": 0.05},
            "samples": {"prompts": []},
            "output": str(output),
        }
    )


def run_kind(kind: str, steps: int, folder: Path) -> dict[str, Any]:
    """Bits a weight, held-out loss before and after, and how far the merged model is from base plus adapter."""
    output = folder / f"{kind}-{steps}"
    train(make_config(kind, steps, output), resume="last" if output.is_dir() else None)
    evals = [line["eval"]["loss"] for line in read_log(find_run(output)) if "eval" in line]
    with tempfile.TemporaryDirectory() as scratch:
        merged = merge(output, Path(scratch) / "merged")
    return {
        "bits": 32.0 if kind == "fp32" else count_bits(load_model(resolve("smollm2"), "float32", quantize=kind)),
        "before": evals[0],
        "after": evals[-1],
        "merge_difference": merged.difference,
    }


def run(kinds: list[str], steps: int, folder: Path) -> dict[str, Any]:
    """All kinds' figures, with their losses over those of the fp32 run where it is among them."""
    results = {kind: run_kind(kind, steps, folder) for kind in kinds}
    if plain := results.get("fp32"):
        for result in results.values():
            result["before_ratio"] = result["before"] / plain["before"]
            result["after_ratio"] = result["after"] / plain["after"]
    return {"steps": steps, "kinds": results}


def print_table(results: dict[str, Any]) -> None:
    """One line a kind."""
    print(
        f"{'base':<10}{'bits':>7}{'loss before':>13}{'after':>9}{'to fp32 before':>16}{'after':>9}{'merge check':>13}"
    )
    for kind, result in results["kinds"].items():
        ratios = [
            f"{100 * (result[key] - 1):+.2f}%" if key in result else "" for key in ("before_ratio", "after_ratio")
        ]
        print(
            f"{kind:<10}{result['bits']:>7.2f}{result['before']:>13.4f}{result['after']:>9.4f}{ratios[0]:>16}"
            f"{ratios[1]:>9}{result['merge_difference']:>13.1e}"
        )


def main() -> None:
    """Run the kinds and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path, help="where the runs are kept; by default they are deleted")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = run(arguments.kinds, arguments.steps, folder)
    if arguments.json:
        print(json.dumps(results))
    else:
        print_table(results)


if __name__ == "__main__":
    main()
