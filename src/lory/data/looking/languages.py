"""Which language a text is in, told by its script and by its commonest words: enough to see what data are made of."""

from __future__ import annotations

import re

from lory.metrics.words import split_words

OTHER = "other"
"""The answer for a text that is too short, mixed, no prose, or in a language that is not known here."""

_CHARACTERS = 600
"""How much of a text is looked at."""

# the letters by which languages that share a script are told apart come before the script itself
_SCRIPTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (code, re.compile(letters))
    for code, letters in (
        ("ja", "[\u3041-\u30fa]"),
        ("ko", "[\uac00-\ud7a3\u1100-\u11ff]"),
        ("zh", "[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U000323af]"),
        ("uk", "[ґєії]"),
        ("ru", "[а-яё]"),
        ("fa", "[پچژگ]"),
        ("ar", "[\u0620-\u064a]"),
        ("hi", "[\u0900-\u097f]"),
        ("bn", "[\u0980-\u09ff]"),
        ("th", "[\u0e01-\u0e4e]"),
        ("el", "[α-ωά-ώ]"),
        ("he", "[\u05d0-\u05ea]"),
    )
)
# of a few marked letters among many plain ones the marked ones tell; kana among Han do so, too
_TELLING = {"ja": 0.1, "uk": 0.01, "fa": 0.01}
_SHARE = 0.3
_LATIN = re.compile(r"[a-zà-öø-ÿāăąćčďđęěğıłńňőœřśşšťůűźżžơưạ-ỹ]")

_WORDS = {
    "en": "the of and to in is that it for was on are as with his they at be this from have or by one had not but what "
    "all were when we there can an your which their said if do will each about how up out them then she many some so "
    "these would other has more two who its you i my me could did does here yes no",
    "es": "de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le ha este sí "
    "porque esta son entre cuando muy sin sobre también hasta hay donde quien desde todo nos qué cómo puedes",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont avec son ou "
    "mais comme nous vous cette être fait ces leur aux je elle tout c'est d'un l'on où très peut quel quelle",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er "
    "hat dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber ich wir du "
    "was kann durch können",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das tem à seu "
    "sua ou ser quando muito há nos já está eu também só pelo pela até isso ela entre você são",
    "it": "di che è e la il un a per in una mi sono non con si da come lo ha le della ma più i del al gli questo dei "
    "nel alla anche se ci delle essere o su questa perché molto può dalla quando cosa",
    "nl": "de van een het en in is dat op te zijn voor met die niet aan er om ook als dan maar bij of uit nog worden "
    "door naar heeft hebben ik je wij hij ze deze kan over geen wordt wat hoe",
    "pl": "i w nie na się z do to że jest o jak a po co tak za od jego ale przez czy dla oraz który jako są był może "
    "być także tego już tylko które",
    "tr": "ve bir bu da de için ne ile çok daha gibi olarak var mi ama o en kadar sonra ben olan değil her şey nasıl "
    "ya ki olduğu veya",
    "vi": "là và của có không được một cho người trong các với này đã những khi để đến ra làm thì từ như tôi bạn cũng "
    "nhiều trên về",
    "id": "yang dan di ini untuk dari dengan tidak dalam itu pada adalah akan ke juga saya atau ada anda oleh bisa "
    "dapat seperti karena sebagai apa",
    "sv": "och att det i en är som på för av med den till inte har om ett jag men var så kan de från vi eller när man "
    "också",
    "cs": "a se na je v že to s z do o i jako ale za by pro jsou jsem jak co po tak nebo který být které",
}

CODES = (*(code for code, _ in _SCRIPTS), *_WORDS)
"""The ISO 639-1 codes that `guess_language` knows."""

_LANGUAGES_OF: dict[str, tuple[str, ...]] = {}
for _code, _text in _WORDS.items():
    for _word in _text.split():
        _LANGUAGES_OF[_word] = (*_LANGUAGES_OF.get(_word, ()), _code)


def guess_language(text: str) -> str:
    """The ISO 639-1 code of the language that most of the text's beginning is in, or `OTHER` where that is unsure."""
    text = text[:_CHARACTERS]
    if not text.isascii():
        lower = text.lower()
        letters = sum(map(str.isalpha, lower))
        latin = len(_LATIN.findall(lower))
        # a Chinese word is two characters, a Latin one five: the script of most words counts, not of most letters
        if 2.5 * (letters - latin) > latin and (code := _guess_by_script(lower, letters - latin)):
            return code
    return _guess_by_words(split_words(text))


def _guess_by_script(text: str, letters: int) -> str:
    return next(
        (code for code, pattern in _SCRIPTS if len(pattern.findall(text)) > _TELLING.get(code, _SHARE) * letters), ""
    )


def _guess_by_words(words: list[str]) -> str:
    """The language whose commonest words are there; it has to have an eighth of them and be well ahead."""
    scores: dict[str, float] = {}
    for word in words:
        if languages := _LANGUAGES_OF.get(word):
            for code in languages:
                scores[code] = scores.get(code, 0.0) + 1 / len(languages)
    ranked = sorted(scores.items(), key=lambda score: -score[1])
    (code, best), (_, second) = [*ranked, (OTHER, 0.0), (OTHER, 0.0)][:2]
    return code if best >= max(1, len(words) / 8) and best > 1.25 * second else OTHER
