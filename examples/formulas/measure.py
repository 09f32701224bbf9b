"""How many formulas a model reads right, and in which style it writes them.

    python -m examples.formulas.measure MODEL data/formulas/easy/test.parquet [-n 500]

It prints one JSON object with shares of all pictures: `exact`, the answer is the text; `formula`, it is so but for
spaces; `spaced` and `unspaced`, its style. A text of one token has both styles.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

from examples.formulas.base import PIECE, QUESTION

from lory.data.making.formula_grammar import join_tokens


def take_pieces(text: str) -> list[str]:
    """Commands and characters, without the spaces."""
    return [piece for piece in re.findall(PIECE, text) if not piece.isspace()]


def squeeze(text: str) -> str:
    """The same LaTeX with only the spaces it needs."""
    return join_tokens(take_pieces(text))


def stretch(text: str) -> str:
    """The same LaTeX with a space between all tokens, as the grammar writes them."""
    return re.sub(r"(\\left|\\right) (?=\S)", r"\1", " ".join(take_pieces(text)))


def score(answers: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Shares of the answers; see the top of this file."""
    pairs = [(answer.strip(), text) for answer, text in zip(answers, texts, strict=True)]
    counts = {
        "exact": sum(answer == text for answer, text in pairs),
        "formula": sum(squeeze(answer) == squeeze(text) for answer, text in pairs),
        "spaced": sum(answer == stretch(answer) for answer, _ in pairs),
        "unspaced": sum(answer == squeeze(answer) for answer, _ in pairs),
    }
    return {name: round(count / max(len(pairs), 1), 4) for name, count in counts.items()}


def read_pictures(path: Path, count: int | None) -> tuple[list[bytes], list[str]]:
    """The first `count` pictures of a Parquet file and their LaTeX."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path, columns=["image", "text"])
    rows = table.slice(0, count).to_pylist()
    return [row["image"]["bytes"] for row in rows], [row["text"] for row in rows]


def measure(model: str, path: Path, count: int | None, batch_size: int) -> dict[str, object]:
    """Answers of `model` to the pictures of a file, scored."""
    import lory
    from lory.generate import GenerationOptions

    images, texts = read_pictures(path, count)
    assistant = lory.load(model)
    start = time.monotonic()
    asked = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]
        for image in images
    ]
    options = GenerationOptions(max_new_tokens=256)
    answers = assistant.chat_batch(asked, options, batch_size)
    wrong = next(
        ({"text": t, "answer": a} for a, t in zip(answers, texts, strict=True) if squeeze(a) != squeeze(t)), None
    )
    seconds = round(time.monotonic() - start, 1)
    return {"model": model, "pictures": len(texts), **score(answers, texts), "seconds": seconds, "first_wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("-n", type=int, default=None, help="only the first so many pictures")
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args()
    print(json.dumps(measure(given.model, given.file, given.n, given.batch_size), ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
