"""What decoding methods do to the repetition in a model's continuations of plain texts.

    python -m benchmarks.continuations smollm2 --data FILE [--prefixes 32] [--methods greedy beam ...] [--json]

Prefixes of 50 tokens are continued by 100, cut as `lory eval --greedy-continuation 50:100` does (whose -n draws the
texts in another order); no continuation may end before. A row is the mean over the continuations; uniq-seq counts over
all of them. What is drawn at random is drawn with the seed 0. Beam search (4 beams) and contrastive search go through
transformers' `generate`, the latter as its custom function, since lory's own take no watcher, which would keep them
from ending early; the others decode as lory does.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from lory.decoding.contrastive_search import PENALTY_ALPHA, TOP_K, contrastive_search
from lory.generate import GenerationOptions
from lory.metrics.repetition import diversity, seq_rep_n, unique_tokens

if TYPE_CHECKING:
    from lory.assistant import Assistant
    from lory.evaluate.records import Question

PREFIX, CONTINUATION = 50, 100
BATCH = 16
OWN: dict[str, dict[str, Any]] = {
    "greedy": {},
    "nucleus": {"do_sample": True, "top_p": 0.9, "top_k": 0, "seed": 0},
    "top-k": {"do_sample": True, "top_k": 50, "seed": 0},
    "penalty": {"repetition_penalty": 1.2},
    "no-repeat": {"no_repeat_ngram_size": 4},
}
THROUGH_GENERATE: dict[str, dict[str, Any]] = {
    "beam": {"num_beams": 4},
    "contrastive": {"custom_generate": contrastive_search, "penalty_alpha": PENALTY_ALPHA, "top_k": TOP_K},
}


def find_prefixes(assistant: Assistant, path: str, count: int) -> list[Question]:
    """`count` prefixes of the file's texts, taken from all in turn, each with what comes after it."""
    from lory.data.encoding.encode import Encoder
    from lory.data.sources.config import SourceConfig
    from lory.evaluate.records import list_prefixes, read_sources

    # how a text is cut into windows to be read makes no difference here
    encoder = Encoder(assistant.tokenizer, assistant.terminators, max_tokens=512)
    (source,) = read_sources([SourceConfig(path=path)], encoder, None)
    return list_prefixes(source, encoder, (PREFIX, CONTINUATION), count)


def continue_prefixes(assistant: Assistant, questions: Sequence[Question], method: str) -> list[list[int]]:
    """The continuations by one of the methods, each of `CONTINUATION` tokens."""
    if method in THROUGH_GENERATE:
        return _generate(assistant, questions, THROUGH_GENERATE[method])
    from lory.evaluate.answers import answer_questions

    options = GenerationOptions(max_new_tokens=CONTINUATION, **OWN[method])
    answers = answer_questions(
        assistant, "", questions, options, 1, BATCH, lambda: False, lambda done, total: None, fixed_length=True
    )
    return [list(answer.answer_ids) for answer in answers]


def _generate(assistant: Assistant, questions: Sequence[Question], search: dict[str, Any]) -> list[list[int]]:
    continuations: list[list[int]] = []
    for start in range(0, len(questions), BATCH):
        prompts = [question.prompt_ids for question in questions[start : start + BATCH]]
        batch = torch.tensor(prompts, device=assistant.model.device)
        output = assistant.model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            min_new_tokens=CONTINUATION,
            max_new_tokens=CONTINUATION,
            do_sample=False,
            eos_token_id=list(assistant.terminators),
            pad_token_id=assistant.terminators[0],
            **search,
        )
        continuations += output[:, PREFIX:].tolist()
    return continuations


def score(continuations: Sequence[Sequence[int]]) -> dict[str, float]:
    """Means of seq-rep-1 to 4 and of diversity, and the number of different tokens in all continuations."""
    scores = {f"seq_rep_{n}": fmean(seq_rep_n(ids, n) for ids in continuations) for n in range(1, 5)}
    scores["diversity"] = fmean(map(diversity, continuations))
    return scores | {"uniq_seq": unique_tokens(list(itertools.chain(*continuations)))}


def main() -> None:
    methods = [*OWN, *THROUGH_GENERATE]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="what `lory chat` takes")
    parser.add_argument("--data", required=True, help="a file of plain texts, one a line")
    parser.add_argument("--prefixes", type=int, default=32)
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.prefixes < 1:
        parser.error("give 1 or more prefixes")
    torch.set_num_threads(options.threads)

    import lory

    assistant = lory.load(options.model)
    questions = find_prefixes(assistant, options.data, options.prefixes)
    rows = {}
    for method in options.methods:
        rows[method] = score(continue_prefixes(assistant, questions, method))
        if not options.json:
            print(method, json.dumps(rows[method]), flush=True)
    rows["human text"] = score([question.target_ids for question in questions])
    print(json.dumps(rows) if options.json else f"human text {json.dumps(rows['human text'])}")


if __name__ == "__main__":
    main()
