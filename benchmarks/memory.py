"""Peak memory of a LoRA step on SmolLM2 over the tokens in its batch, and one long context under a limit.

    python -m benchmarks.memory [--tokens 512,1024,2048,4096] [--row 512] [--targets qv|all] [--context 8192]
                                [--limit-gb 10] [--data FILE] [--peer-python PATH] [--json]

Each figure is the peak of a process of its own that takes one step. The straight line through them says how many bytes
a token costs. Then one row of `--context` tokens is trained in processes that may have `--limit-gb` of memory for their
data (RLIMIT_DATA, so on Linux): a trainer that needs more fails there. `--context 0` leaves this out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.peers.turns import ADAPTERS
from benchmarks.workers import Row, Worker, WorkerEnded, cut_rows, find_versions, read_samples, write_job


def take_step(
    peer: str, python: str, rows: list[Row], targets: str, threads: int, limit_bytes: int | None = None
) -> dict[str, float]:
    """One step over all of `rows` in a new process.

    Raises:
        WorkerEnded: the process failed, for want of memory if there is a limit.
    """
    with write_job(rows, len(rows), targets, limit_bytes) as job, Worker(peer, python, job, threads) as worker:
        worker.start()
        return worker.step()


def fit_line(tokens: list[int], peaks: list[float]) -> dict[str, float]:
    """The line of least squares through the peaks, and the largest distance from it as a share of the peak."""
    slope, start = np.polyfit(tokens, peaks, 1)
    off = max(abs(start + slope * n - peak) / peak for n, peak in zip(tokens, peaks, strict=True))
    return {"bytes_a_token": float(slope), "bytes_at_zero": float(start), "off_the_line": float(off)}


def measure_slopes(
    pythons: dict[str, str], samples: list[Row], tokens: list[int], row: int, targets: str, threads: int
) -> dict[str, Any]:
    """Peaks and their line for each peer."""
    result = {}
    for peer, python in pythons.items():
        peaks = [
            take_step(peer, python, cut_rows(samples, row, n // row), targets, threads)["peak_bytes"] for n in tokens
        ]
        result[peer] = {"tokens": tokens, "peak_bytes": peaks} | fit_line(tokens, peaks)
    return result


def try_context(
    pythons: dict[str, str], rows: list[Row], targets: str, threads: int, limit_bytes: int
) -> dict[str, Any]:
    """For each peer its step under the limit, or None where it failed."""
    result: dict[str, Any] = {}
    for peer, python in pythons.items():
        try:
            result[peer] = take_step(peer, python, rows, targets, threads, limit_bytes)
        except WorkerEnded as error:
            print(error, file=sys.stderr)
            result[peer] = None
    return result


def print_tables(result: dict[str, Any]) -> None:
    """Peaks, slopes and the long context."""
    lines = result["slopes"]
    print(
        f"{'peak MB at tokens':<20}"
        + "".join(f"{n:>8}" for n in lines["lory"]["tokens"])
        + "   KB a token, off the line"
    )
    for peer, line in lines.items():
        row = "".join(f"{peak / 1e6:8.0f}" for peak in line["peak_bytes"])
        print(f"  {peer:<18}{row}   {line['bytes_a_token'] / 1e3:10.0f}, {line['off_the_line']:.1%}")
    print(f"  lory's slope is {result['slope_ratio']:.2f} of hf's")
    if context := result["context"]:
        print(f"a row of {context['tokens']} tokens with {context['limit_bytes'] / 1e9:.0f} GB:")
        for peer, step in context["steps"].items():
            needed = lines[peer]["bytes_at_zero"] + lines[peer]["bytes_a_token"] * context["tokens"]
            told = f"{step['seconds']:.0f} s, peak {step['peak_bytes'] / 1e9:.1f} GB" if step else "fails"
            print(f"  {peer:<18}{told} (the line says {needed / 1e9:.1f} GB)")


def main() -> None:
    """Measure and print tables, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="512,1024,2048,4096", help="tokens of the batches, as in 512,1024")
    parser.add_argument("--row", type=int, default=512, help="tokens of a row; --tokens are multiples of it")
    parser.add_argument("--targets", choices=ADAPTERS, default="qv")
    parser.add_argument("--context", type=int, default=8192, help="tokens of the long row; 0: none")
    parser.add_argument("--limit-gb", type=float, default=10.0, help="for the long row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default="general", help="a source, as in data.train")
    parser.add_argument("--peer-python", help="a Python that has peft and accelerate")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    pythons = {"hf": arguments.peer_python or sys.executable, "lory": sys.executable}
    tokens = [int(number) for number in arguments.tokens.split(",")]
    samples = read_samples(arguments.data)
    slopes = measure_slopes(pythons, samples, tokens, arguments.row, arguments.targets, arguments.threads)
    context = None
    if arguments.context:
        limit = int(arguments.limit_gb * 1e9)
        rows = cut_rows(samples, arguments.context, 1)
        steps = try_context(pythons, rows, arguments.targets, arguments.threads, limit)
        context = {"tokens": arguments.context, "limit_bytes": limit, "steps": steps}
    result = {
        "targets": arguments.targets,
        "data": Path(arguments.data).name,
        "row": arguments.row,
        "versions": find_versions(pythons["hf"]),
        "slopes": slopes,
        "slope_ratio": slopes["lory"]["bytes_a_token"] / slopes["hf"]["bytes_a_token"],
        "context": context,
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print_tables(result)


if __name__ == "__main__":
    main()
