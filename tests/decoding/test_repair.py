"""Repair takes out what is said again and leaves what differs, in English and in Chinese."""

from __future__ import annotations

import pytest

from lory.decoding.repair import Span, repair


@pytest.mark.parametrize(
    ("text", "repaired"),
    [
        ("I like cats. I like cats. I like cats. I like dogs.", "I like cats. I like dogs."),
        # two sentences in turn
        ("Tea is hot. Ice is cold. Tea is hot. Ice is cold. Snow falls.", "Tea is hot. Ice is cold. Snow falls."),
        # broken off in the middle of a copy
        ("I like cats. I like cats. I like ca", "I like cats."),
        # a long sentence again, further down
        (
            "The dogs bark in my street all night. It is cold.\n\nThe dogs bark in my street all night. Good night.",
            "The dogs bark in my street all night. It is cold.\n\nGood night.",
        ),
        ("We saw the cat and the cat and the cat and the cat.", "We saw the cat and the cat."),
        ("It is very very very very very good.", "It is very good."),
        ('He said "Go away now!" He said "Go away now!" And left.', 'He said "Go away now!" And left.'),
        ("I LIKE cats. I like cats. Yes.", "I LIKE cats. Yes."),
        ("我喜欢猫。我喜欢猫。我喜欢猫。我喜欢狗。", "我喜欢猫。我喜欢狗。"),
        ("今天天气很好，今天天气很好，今天天气很好，出去走走吧。", "今天天气很好，出去走走吧。"),
        ("你好吗？你好吗？我很好！", "你好吗？我很好！"),
        ("1. I like cats. I like cats. I like cats.\n2. I like dogs.\n", "1. I like cats.\n2. I like dogs.\n"),
        ("- one more item\n" * 5 + "- another\n", "- one more item\n- another\n"),
    ],
)
def test_repetitions_go(text: str, repaired: str) -> None:
    assert repair(text).text == repaired


@pytest.mark.parametrize(
    "text",
    [
        "",
        "One sentence.",
        "No. No. That is very, very, very good. 哈哈哈哈!",
        "Pi is 3.14159. The row 0 0 0 0 0 0 0 is zero, and 10, 10, 10, 10 too.",
        "I like cats. I like dogs. I like birds. I like fish.",
        "- yes\n- no\n- yes\n- no\n",
        "* red\n* red\n* blue\n",
        "```python\nx += 1\nx += 1\nx += 1\nx += 1\n```\n",
        "Before.\n\n    x += 1\n    x += 1\n    x += 1\n",
        "| a | b |\n| --- | --- |\n| 0 | 0 |\n| 0 | 0 |\n| 0 | 0 |\n",
        "$$\n0 0 0\n0 0 0\n0 0 0\n$$\n",
        "Row, row, row your boat\nGently down the stream\n\nLife is but a dream\n\n"
        "Row, row, row your boat\nGently down the stream\n",
        "床前明月光，\n疑是地上霜。\n\n低头思故乡，\n\n床前明月光，\n疑是地上霜。\n",
        "Is it so? It is so. Is it so! Well, e.g. this.",
    ],
)
def test_what_is_no_parroting_stays(text: str) -> None:
    result = repair(text)
    assert result.text == text
    assert result.removed == []


def test_the_spans_are_what_is_missing() -> None:
    text = "I like cats. I like cats. Now the end and the end and the end and the end of it. 你好吗？你好吗？"
    result = repair(text)
    assert result.removed[0] == Span(13, 26)
    for span in reversed(result.removed):
        text = text[: span.start] + text[span.end :]
    assert text.rstrip() == result.text


def test_a_repaired_text_needs_no_repair() -> None:
    text = "I like cats. " * 5 + "so and so and so and so and so on. " + "他说好。" * 4
    once = repair(text).text
    assert repair(once).text == once


def test_long_texts_take_no_long_time() -> None:
    # 20,000 words, all different
    text = " ".join(f"Word{number} follows{number} here." for number in range(7000))
    assert repair(text).text == text
    assert repair("ab " * 20_000).text == "ab "
