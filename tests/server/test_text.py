"""Text comes in whole characters and stops before a stop string, wherever tokens part it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lory.generate import decode_text
from lory.server.text import ScoredToken, TextStream


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def feed(tokenizer: Any, text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, stops)
    pieces = []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(stream.feed(token, ScoredToken(token, -1.0, offset=stream.offset)))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


def test_the_pieces_are_the_text(tokenizer: Any) -> None:
    text = "The capital is 你好, and 🦜 is a lory.  "
    pieces, stream = feed(tokenizer, text)
    assert "".join(pieces) == text == decode_text(tokenizer, tokenizer(text)["input_ids"])
    assert "\ufffd" not in "".join(pieces)
    assert [scored.token for scored in stream.take_scored(final=True)] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("stop", ["x", "quick", "ick br", "fox jumps over", "你", "好 a"])
def test_a_stop_string_is_found_across_tokens(tokenizer: Any, stop: str) -> None:
    text = "The quick brown fox jumps over 你好 and x"
    pieces, stream = feed(tokenizer, text, ("never", stop))
    assert "".join(pieces) == text[: text.index(stop)]
    assert stream.stopped
    assert all(scored.offset < text.index(stop) for scored in stream.take_scored(final=True))


def test_what_may_begin_a_stop_string_is_held_back_and_given_at_the_end(tokenizer: Any) -> None:
    pieces, stream = feed(tokenizer, "one two STO", ("STOP",))
    assert "".join(pieces[:-1]) == "one two "
    assert pieces[-1] == "STO"
    assert not stream.stopped


def test_the_first_of_several_stop_strings_counts(tokenizer: Any) -> None:
    assert "".join(feed(tokenizer, "a b c d", ("c", "b c"))[0]) == "a "


def test_an_unfinished_character_is_given_at_the_end(tokenizer: Any) -> None:
    stream = TextStream(tokenizer)
    first = tokenizer("🦜")["input_ids"][0]
    assert stream.feed(first) == ""
    assert stream.finish() == "\ufffd"
