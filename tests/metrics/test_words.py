"""Words and sentences of texts in many scripts."""

from __future__ import annotations

import pytest

from lory.metrics.words import split_pieces, split_sentences, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, World! It's 3.14.", ["hello", "world", "it's", "3", "14"]),
        ("don’t snake_case", ["don't", "snake", "case"]),
        ("你好，世界！", ["你", "好", "世", "界"]),
        ("カタカナ・ひらがな", list("カタカナひらがな")),
        ("한국어 문장", ["한국어", "문장"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("Straße CAFÉ", ["strasse", "café"]),
        ("GPT-4是模型", ["gpt", "4", "是", "模", "型"]),
        (" … —!", []),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


def test_both_spellings_of_an_accent_are_one_word() -> None:
    assert split_words("caf\u00e9") == split_words("cafe\u0301")


def test_marks_stay_with_their_character_in_scripts_without_spaces() -> None:
    assert split_words("ก่า") == ["ก่", "า"]


def test_ascii_text_splits_as_the_pattern_of_all_scripts_does() -> None:
    text = "He said: \"don't\" -- 'quoted' rock'n'roll x=y_z; 12'5 a''b"
    assert split_words(text) == split_words(text + " é")[:-1]


def test_pieces_are_the_words_with_the_punctuation_that_follows() -> None:
    text = "If x == 1: y. 你好，“吗？”"
    assert split_pieces(text) == ["if", "x==", "1:", "y.", "你", "好，“", "吗？”"]
    assert len(split_pieces(text)) == len(split_words(text))


def test_sentences_end_with_marks_quotes_or_lines() -> None:
    text = 'He said "Hi." Then?! Pi is 3.14\n- one\n\n- two\n你好。再见！“好。”走了'
    assert split_sentences(text) == [
        'He said "Hi."',
        "Then?!",
        "Pi is 3.14",
        "- one",
        "- two",
        "你好。",
        "再见！",
        "“好。”",
        "走了",
    ]
    assert split_sentences(" \n ") == []
