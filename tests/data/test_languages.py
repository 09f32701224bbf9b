"""Languages are told by script and by common words, and what is unsure is called other."""

from __future__ import annotations

import pytest

from lory.data.looking.languages import CODES, OTHER, guess_language

CAT = {
    "en": "The cat sat on the mat, and it was warm.",
    "es": "El gato está en la casa y no quiere salir.",
    "fr": "Le chat est dans la maison et il ne veut pas sortir.",
    "de": "Die Katze ist im Haus und sie will nicht nach draußen.",
    "pt": "O gato está na casa e não quer sair.",
    "it": "Il gatto è nella casa e non vuole uscire.",
    "nl": "De kat is in het huis en wil niet naar buiten.",
    "pl": "Kot jest w domu i nie chce wyjść.",
    "tr": "Kedi evde ve bu çok güzel bir ev.",
    "vi": "Con mèo ở trong nhà và không muốn ra ngoài.",
    "id": "Kucing itu ada di dalam rumah dan tidak mau keluar.",
    "sv": "Katten är i huset och vill inte gå ut.",
    "cs": "Kočka je v domě a nechce jít ven.",
    "ru": "Кошка сидит дома.",
    "uk": "Кішка сидить удома і їсть.",
    "ar": "القطة في البيت",
    "fa": "گربه در خانه است",
    "zh": "猫在家里。",
    "ja": "猫は家にいます。",
    "ko": "고양이는 집에 있다.",
    "hi": "बिल्ली घर में है।",
    "bn": "বিড়াল ঘরে আছে।",
    "th": "แมวอยู่ในบ้าน",
    "el": "Η γάτα είναι στο σπίτι.",
    "he": "החתול בבית.",
}


@pytest.mark.parametrize("code", CODES)
def test_a_sentence_is_enough(code: str) -> None:
    assert guess_language(CAT[code]) == code


@pytest.mark.parametrize(
    "text", ["", "42", "Paris", "def f(x): return x * 2", "(555) 123-4567", "🦜🦜", "Amanda, James"]
)
def test_what_is_no_sentence_is_other(text: str) -> None:
    assert guess_language(text) == OTHER


def test_most_of_a_mixed_text_counts() -> None:
    assert guess_language("The word 你好 means hello in Chinese, and it is common.") == "en"
    assert guess_language("用 Python 写一个计算阶乘的函数。") == "zh"


def test_only_the_beginning_is_looked_at() -> None:
    assert guess_language(CAT["en"] * 20 + CAT["zh"] * 900) == "en"
