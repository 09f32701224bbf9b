"""LoRA steps on random Llamas of 1B and 8B on a GPU: lory beside the Trainer with PEFT, TRL and Unsloth, and in FP8.

    python -m benchmarks.cuda [--shape 1b|8b|tiny] [--tokens 8192] [--steps 12] [--targets all|qv] [--device cuda]
                              [--variants hf,lory,...] [--json FILE]

Nothing is downloaded: weights and documents are random. Every step's documents (of uneven lengths, 8,192 tokens in all)
are the same for all; each variant runs in a process of its own, and what is not installed is left out and said. The
first four steps warm up. Peak memory is what torch allocated. `lory` uses Liger's kernels where they are installed;
`lory-layers` trains the model's own layers; the peers are described in `benchmarks.peers.cuda_hf`. Where lory is not
installed, run it with ``PYTHONPATH=src``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.peers import cuda_hf, cuda_lory
from benchmarks.peers.random_models import SHAPES, TARGETS

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 4
# the packages that each needs, and the compute capability
NEEDS: dict[str, tuple[tuple[str, ...], tuple[int, int]]] = {
    "hf": (("peft",), (0, 0)),
    "hf-liger": (("peft", "liger_kernel"), (7, 0)),
    "hf-flash": (("peft", "flash_attn"), (8, 0)),
    "trl": (("peft", "trl", "datasets"), (0, 0)),
    "trl-liger": (("peft", "trl", "datasets", "liger_kernel"), (7, 0)),
    "unsloth": (("unsloth",), (7, 0)),
    "lory": ((), (0, 0)),
    "lory-plain": ((), (0, 0)),
    "lory-compiled": (("triton",), (7, 0)),
    "lory-liger": (("liger_kernel",), (7, 0)),
    "lory-layers": ((), (0, 0)),
    "lory-fp8": ((), (9, 0)),
}


def find_obstacle(variant: str, device: torch.device) -> str:
    """Why a variant cannot run here; empty if it can."""
    packages, capability = NEEDS[variant]
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        return f"{', '.join(missing)} not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < capability:
        return f"needs compute capability {capability[0]}.{capability[1]}"
    if device.type == "cpu" and capability > (0, 0) and variant != "lory-fp8":
        return "needs a GPU"
    return ""


def run_here(job: dict[str, Any], variant: str) -> dict[str, Any]:
    """A variant in this process."""
    return (cuda_lory if variant.startswith("lory") else cuda_hf).run(job, variant)


def run_apart(job: dict[str, Any], variant: str) -> dict[str, Any]:
    """A variant in a process of its own; an `error` where it fails, as for want of memory."""
    command = [sys.executable, "-m", "benchmarks.cuda", "--serve", variant, "--job", json.dumps(job)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    for line in result.stdout.splitlines():
        if line.startswith("@"):
            answer: dict[str, Any] = json.loads(line[1:])
            return answer
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return {"error": lines[-1] if lines else f"ended with code {result.returncode}"}


def describe(result: dict[str, Any]) -> dict[str, Any]:
    """Figures of the steps behind the warm-up."""
    first = min(WARM_UP, len(result["seconds"]) - 1)
    seconds = result["seconds"][first:]
    return {
        "tokens_per_second": sum(result["tokens"][first : first + len(seconds)]) / sum(seconds),
        "seconds": statistics.median(seconds),
        "peak_bytes": result["peak_bytes"],
        "losses": result["losses"],
    }


def measure(job: dict[str, Any], variants: list[str], apart: bool) -> dict[str, Any]:
    """Figures of each variant, or why there are none."""
    device = torch.device(job["device"])
    results = {}
    for variant in variants:
        if obstacle := find_obstacle(variant, device):
            results[variant] = {"left_out": obstacle}
            continue
        result = run_apart(job, variant) if apart else run_here(job, variant)
        results[variant] = result if "error" in result else describe(result)
        print(tell(variant, results[variant], results.get("hf", {})), flush=True)
    return results


def tell(variant: str, figures: dict[str, Any], reference: dict[str, Any]) -> str:
    """A line of the table; the losses are compared with the Trainer's, step by step."""
    if note := figures.get("left_out") or figures.get("error"):
        return f"{variant:<14} {note}"
    line = f"{variant:<14} {figures['tokens_per_second']:10,.0f} tokens/s {figures['seconds'] * 1e3:8.0f} ms a step"
    line += f" {figures['peak_bytes'] / 1e9:7.2f} GB"
    if not variant.startswith("trl") and "losses" in reference:
        # TRL packs the documents into rows of its own
        pairs = list(zip(figures["losses"], reference["losses"], strict=False))
        apart = [abs(ours - theirs) for ours, theirs in pairs]
        line += f"   loss off by {apart[0]:.1e} at first, {max(apart):.1e} at most"
    return line


def main() -> None:
    """Run what can be run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--targets", choices=TARGETS, default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variants", default=",".join(NEEDS), help="some of them, as in hf,lory")
    parser.add_argument("--in-process", action="store_true", help="all in this process, to look for errors")
    parser.add_argument("--json", type=Path, help="a file for the results")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        with contextlib.redirect_stdout(sys.stderr):
            answer = run_here(json.loads(arguments.job), arguments.serve)
        print("@" + json.dumps(answer))
        return
    variants = arguments.variants.split(",")
    if unknown := [name for name in variants if name not in NEEDS]:
        parser.error(f"'{unknown[0]}' is no variant; there are {', '.join(NEEDS)}")
    job = {name: getattr(arguments, name) for name in ("shape", "tokens", "steps", "targets", "device")}
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}: {arguments.shape}, LoRA on {arguments.targets}, {arguments.tokens} tokens"
    )
    results = measure(job, variants, apart=not arguments.in_process)
    for variant, figures in results.items():
        if "left_out" in figures:
            print(tell(variant, figures, {}))
    if arguments.json:
        about = {"device": name, "torch": torch.__version__}
        arguments.json.write_text(json.dumps(about | job | {"variants": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
