"""Preparing data: from a file of records to encoded and packed rows, by lory, LLaMA-Factory and TRL.

    python -m benchmarks.data [--data FILE] [--records 200000] [--distinct] [--rounds 3] [--workers 2]
                              [--trl PYTHON] [--llamafactory PYTHON] [--json]

The records of an alpaca file (by default sums made on the spot) are repeated up to the number wanted; with --distinct
each is given a number, so that no two are equal. Each tool reads the same file in a process of its own, in turn, with
SmolLM2's tokenizer and template, rows of 2,048 tokens, and no cache; the time is that of the preparation without the
imports, the memory the process's peak beyond what it held before. The peers are run by the Python of the environment in
which they are installed (their pins differ from lory's); one that is not named is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MAX_TOKENS = 2048


def write_records(path: Path, source: Path | None, count: int, distinct: bool) -> None:
    """`count` alpaca records as a JSON array."""
    if source:
        records = json.loads(source.read_text(encoding="utf-8"))
    else:
        records = [
            {
                "instruction": f"What is {number} + {7 * number}?",
                "input": "",
                "output": f"{number} + {7 * number} = {8 * number}. " * (1 + number % 9),
            }
            for number in range(1000)
        ]
    with path.open("w", encoding="utf-8") as file:
        for number, record in zip(range(count), itertools.cycle(records), strict=False):
            text = f"{record['instruction']} ({number})" if distinct else record["instruction"]
            file.write(("[" if not number else ",\n") + json.dumps({**record, "instruction": text}, ensure_ascii=False))
        file.write("]")


def run(tool: str, python: str, file: Path, tokenizer: Path, workers: int) -> dict[str, Any]:
    """One preparation in a process of its own: seconds, tokens, rows and bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [python, str(HERE / "peers" / f"data_{tool}.py"), str(file), str(tokenizer), str(workers), scratch]
        settings = {"HF_HOME": scratch, "HF_HUB_OFFLINE": "1", "LORY_CACHE": scratch, "DISABLE_VERSION_CHECK": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    if done.returncode:
        raise SystemExit(f"{tool} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def save_tokenizer(folder: Path) -> None:
    """SmolLM2's tokenizer, and a tiny model's config for the peers that ask for a model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lory.models.load import load_tokenizer
    from lory.models.resolve import resolve

    tokenizer = load_tokenizer(resolve("smollm2"))
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), head_dim=8, **shape))
    model.save_pretrained(folder)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All tools on the same file, in turn, for some rounds."""
    tools = {"lory": sys.executable, "trl": arguments.trl, "llamafactory": arguments.llamafactory}
    tools = {tool: python for tool, python in tools.items() if python}
    results: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_records(folder / "records.json", arguments.data, arguments.records, arguments.distinct)
        save_tokenizer(folder / "model")
        for number in range(arguments.rounds):
            for tool, python in list(tools.items())[:: -1 if number % 2 else 1]:
                results[tool].append(run(tool, python, folder / "records.json", folder / "model", arguments.workers))
    return {"records": arguments.records, "distinct": arguments.distinct, "tools": results}


def describe(result: dict[str, Any]) -> str:
    """A table: medians, and each peer's time over lory's in the same round."""
    lines = [f"{'tool':<14}{'seconds':>9}{'tokens/s':>12}{'packed':>9}{'memory MB':>11}{'times lory (min-max)':>24}"]
    ours = result["tools"]["lory"]
    for tool, rounds in result["tools"].items():
        seconds = statistics.median(r["seconds"] for r in rounds)
        ratios = sorted(theirs["seconds"] / mine["seconds"] for theirs, mine in zip(rounds, ours, strict=True))
        spread = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})"
        share = rounds[0]["tokens"] / (rounds[0]["rows"] * MAX_TOKENS)
        memory = statistics.median(r["bytes"] for r in rounds) / 1e6
        lines.append(
            f"{tool:<14}{seconds:>9.1f}{rounds[0]['tokens'] / seconds:>12,.0f}{share:>9.1%}{memory:>11,.0f}{spread:>24}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an alpaca file")
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--distinct", action="store_true", help="give each record a number")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that encode, of every tool")
    parser.add_argument("--trl", help="the Python of an environment with TRL")
    parser.add_argument("--llamafactory", help="the Python of an environment with LLaMA-Factory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(json.dumps(result) if arguments.json else describe(result))


if __name__ == "__main__":
    main()
