"""Contrastive search and greedy decoding on SmolLM2: seconds a token, and how much the continuations repeat themselves.

    python -m benchmarks.contrastive --data wiki.txt [--prefixes 128] [--alphas 0.6 0.7] [--top-k 4 5] [--json]

Repetition: prefixes of 50 tokens, one from each of as many stretches of the text file, are continued by 100 tokens at
most, and seq-rep-4 is averaged over the continuations. Those of the file's first half are there to choose settings by,
those of the second half to report them. Speed: greedy decoding and contrastive search take turns at batch size 1, and
what counts is the median of the ratios within a round; `--clock processor` leaves out what else the machine does. Once
both go through transformers' `generate` and the model's own forward, once both as lory decodes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lory.decoding.contrastive_search import PENALTY_ALPHA, TOP_K, contrastive_search
from lory.generate import GenerationOptions, generate_ids
from lory.metrics.repetition import diversity, seq_rep_n

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX, CONTINUATION, BATCH = 50, 100, 32
HALVES = ("chosen by", "reported")


def read_prefixes(path: Path, count: int, tokenizer: Any, tokens: int = PREFIX) -> torch.Tensor:
    """(count, tokens) from the starts of `count` equal stretches of the file."""
    text = path.read_text(encoding="utf-8")
    rows = []
    for start in range(0, len(text) - len(text) // count + 1, len(text) // count)[:count]:
        # a stretch begins inside a word; the next word is whole
        rows.append(tokenizer(text[start : start + 2000].split(" ", 1)[1])["input_ids"][:tokens])
    return torch.tensor(rows)


TIMED = 64
"""Tokens of a timed continuation."""


def time_rounds(
    greedy: Callable[[], Any], search: Callable[[], Any], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Medians over the rounds: milliseconds a token of each way, and the ratio."""

    def run(way: Callable[[], Any]) -> float:
        started = clock()
        way()
        return (clock() - started) / TIMED * 1e3

    run(search), run(greedy)
    times = []
    for number in range(rounds):
        # who is first takes turns, too
        first, second = (greedy, search) if number % 2 else (search, greedy)
        one, two = run(first), run(second)
        times.append((one, two) if number % 2 else (two, one))
    return {
        "greedy_ms": statistics.median(greedy for greedy, _ in times),
        "contrastive_ms": statistics.median(contrastive for _, contrastive in times),
        "ratio": statistics.median(contrastive / greedy for greedy, contrastive in times),
    }


def list_ways(model: PreTrainedModel, prefix: torch.Tensor, k: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Greedy decoding and contrastive search through transformers' `generate`."""
    given: dict[str, Any] = {
        "attention_mask": torch.ones_like(prefix),
        "max_new_tokens": TIMED,
        "min_new_tokens": TIMED,
        "do_sample": False,
    }
    search = {"custom_generate": contrastive_search, "penalty_alpha": PENALTY_ALPHA, "top_k": k}
    return lambda: model.generate(prefix, **given), lambda: model.generate(prefix, **given, **search)


def list_own_ways(model: PreTrainedModel, prefix: torch.Tensor, k: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same as lory decodes, through its lean forward."""
    nothing = [model.config.vocab_size - 1]  # no token that would end an answer early
    greedy = GenerationOptions(max_new_tokens=TIMED)
    search = GenerationOptions(max_new_tokens=TIMED, penalty_alpha=PENALTY_ALPHA, top_k=k)
    ids = prefix[0].tolist()
    return lambda: generate_ids(model, ids, greedy, nothing), lambda: generate_ids(model, ids, search, nothing)


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
    parser.add_argument("--prefixes", type=int, default=128, help="2 or more")
    parser.add_argument("--alphas", type=float, nargs="*", default=[PENALTY_ALPHA])
    parser.add_argument("--top-k", type=int, nargs="*", default=[TOP_K])
    parser.add_argument("--rounds", type=int, default=5, help="of the speed comparison; 0: none")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--half", choices=[*HALVES, "both"], default="both", help="of the prefixes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lory.models.embedded import prepare_smollm2
    from lory.models.lean import prepare_for_decoding

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = prepare_smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prefixes = read_prefixes(options.data, options.prefixes, AutoTokenizer.from_pretrained(folder))
    say = (lambda *_, **__: None) if options.json else print
    report: dict[str, Any] = {}
    clock = time.process_time if options.clock == "processor" else time.perf_counter
    for k in options.top_k if options.rounds else []:
        name = f"speed of transformers' generate, k {k}"
        report[name] = time_rounds(*list_ways(model, prefixes[:1], k), options.rounds, clock)
        say(name, json.dumps(report[name]), flush=True)
    ways: dict[str, dict[str, Any]] = {"greedy": {}}
    for alpha, k in itertools.product(options.alphas, options.top_k):
        search = {"custom_generate": contrastive_search, "penalty_alpha": alpha, "top_k": k}
        ways[f"alpha {alpha}, k {k}"] = search
    halves = dict(zip(HALVES, prefixes.split((len(prefixes) + 1) // 2), strict=True))
    for (way, search), half in itertools.product(ways.items(), halves):
        if options.half in (half, "both"):
            report[f"{way}, {half}"] = measure_repetition(model, halves[half], **search)
            say(f"{way}, {half}", json.dumps(report[f"{way}, {half}"]), flush=True)
    # at last, since it lays the weights out anew
    prepare_for_decoding(model)
    for k in options.top_k if options.rounds else []:
        name = f"speed of lory, k {k}"
        report[name] = time_rounds(*list_own_ways(model, prefixes[:1], k), options.rounds, clock)
        say(name, json.dumps(report[name]), flush=True)
    if options.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
