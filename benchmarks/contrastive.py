"""Contrastive search and greedy decoding on SmolLM2: seconds a token, and how much the continuations repeat themselves.

    python -m benchmarks.contrastive --data wiki.txt [--prefixes 32] [--alphas 0.4 0.6] [--top-k 4 5] [--json]

Repetition: prefixes of 50 tokens, one from each of as many stretches of the text file, are continued by 100 tokens at
most, and seq-rep-4 is averaged over the continuations. Speed: greedy (transformers' own) and contrastive search take
turns at batch size 1, and what counts is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lory.decoding.contrastive_search import PENALTY_ALPHA, TOP_K, contrastive_search
from lory.metrics.repetition import diversity, seq_rep_n

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX, CONTINUATION, BATCH = 50, 100, 8


def read_prefixes(path: Path, count: int, tokenizer: Any) -> torch.Tensor:
    """(count, PREFIX) tokens from the starts of `count` equal stretches of the file."""
    text = path.read_text(encoding="utf-8")
    rows = []
    for start in range(0, len(text) - len(text) // count + 1, len(text) // count)[:count]:
        # a stretch begins inside a word; the next word is whole
        rows.append(tokenizer(text[start : start + 2000].split(" ", 1)[1])["input_ids"][:PREFIX])
    return torch.tensor(rows)


def time_rounds(model: PreTrainedModel, prefix: torch.Tensor, rounds: int, alpha: float, k: int) -> dict[str, float]:
    """Medians over the rounds: milliseconds a token of each way, and the ratio."""

    def run(**options: Any) -> float:
        started = time.perf_counter()
        model.generate(
            prefix,
            attention_mask=torch.ones_like(prefix),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            **options,
        )
        return (time.perf_counter() - started) / 64 * 1e3

    search = {"custom_generate": contrastive_search, "penalty_alpha": alpha, "top_k": k}
    run(**search), run()
    times = []
    for number in range(rounds):
        # who is first takes turns, too
        first, second = ({}, search) if number % 2 else (search, {})
        one, two = run(**first), run(**second)
        times.append((one, two) if number % 2 else (two, one))
    return {
        "greedy_ms": statistics.median(greedy for greedy, _ in times),
        "contrastive_ms": statistics.median(contrastive for _, contrastive in times),
        "ratio": statistics.median(contrastive / greedy for greedy, contrastive in times),
    }


def measure_repetition(model: PreTrainedModel, prefixes: torch.Tensor, **options: Any) -> dict[str, float]:
    """seq-rep-4 and diversity, averaged over the continuations."""
    answers: list[list[int]] = []
    ends = model.generation_config.eos_token_id
    for batch in prefixes.split(BATCH):
        mask = torch.ones_like(batch)
        output = model.generate(
            batch, attention_mask=mask, max_new_tokens=CONTINUATION, do_sample=False, pad_token_id=ends, **options
        )
        # an answer goes up to its end, if it has one
        answers += [list(itertools.takewhile(lambda token: token != ends, ids)) for ids in output[:, PREFIX:].tolist()]
    return {
        "seq_rep_4": statistics.mean(seq_rep_n(ids, 4) for ids in answers),
        "seq_rep_4_of_first_50": statistics.mean(seq_rep_n(ids[:50], 4) for ids in answers),
        "tokens": statistics.mean(len(ids) for ids in answers),
        "diversity": statistics.mean(diversity(ids) for ids in answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text file to take prefixes from")
    parser.add_argument("--prefixes", type=int, default=32)
    parser.add_argument("--alphas", type=float, nargs="*", default=[PENALTY_ALPHA])
    parser.add_argument("--top-k", type=int, nargs="*", default=[TOP_K])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the speed comparison")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lory.models.embedded import prepare_smollm2

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = prepare_smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prefixes = read_prefixes(options.data, options.prefixes, AutoTokenizer.from_pretrained(folder))
    say = (lambda *_, **__: None) if options.json else print
    report: dict[str, Any] = {}
    for k in options.top_k:
        name = f"speed, k {k}"
        report[name] = time_rounds(model, prefixes[:1], options.rounds, PENALTY_ALPHA, k)
        say(name, json.dumps(report[name]), flush=True)
    report["greedy"] = measure_repetition(model, prefixes)
    say("greedy", json.dumps(report["greedy"]), flush=True)
    for alpha in options.alphas:
        for k in options.top_k:
            search = {"custom_generate": contrastive_search, "penalty_alpha": alpha, "top_k": k}
            name = f"alpha {alpha}, k {k}"
            report[name] = measure_repetition(model, prefixes, **search)
            say(name, json.dumps(report[name]), flush=True)
    if options.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
