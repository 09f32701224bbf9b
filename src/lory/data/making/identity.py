"""Identity data: short conversations that teach a model its own name and who made it."""

from __future__ import annotations

import functools
import itertools
import random
import re
from importlib import resources

from lory.config import Section, build, parse_yaml
from lory.runtime import UsageError
from lory.types import Conversation, Message

MAX_CHARACTERS = 100
SECOND_TURN_SHARE = 0.15
SYSTEM_SHARE = 0.15
TWICE_ANSWERED = {"en": 1.0, "zh": 0.5}
"""For each language, the share of its questions that appear with two answers instead of one."""

# what separates turns in the chat templates of common models; in a name it could end a turn in the middle of an answer
_TEMPLATE_MARKS = ("<|", "|>", "<\uff5c", "<s>", "</s>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>")
_PLACEHOLDERS = ("{name}", "{author}")


class _Topic(Section):
    """Questions and answers of which any pair makes sense."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


class _Texts(Section):
    """What a file identity_LANGUAGE.yaml holds."""

    system: tuple[str, ...]
    first_exchanges: tuple[tuple[str, str], ...]
    others: tuple[tuple[str, ...], ...]
    topics: dict[str, _Topic]


def identity_conversations(name: str, author: str, seed: int = 0) -> list[Conversation]:
    """About 420 conversations, English and Chinese, in which an assistant says that it is `name`, made by `author`.

    It is for fine-tuning a small model into an assistant with its own identity: every last answer holds both names,
    whether the user asks for a name, a maker or an introduction, just greets, or takes the assistant for another one.
    Mix it with general records: a model that is trained on this set alone forgets how to talk about anything else,
    and answers every question with its name.

    The same arguments give the same list; another seed gives other pairs of question and answer in another order.

    Raises:
        UsageError: `name` or `author` is empty, of several lines, longer than 100 characters, or holds what a chat
            template or the set itself uses as a mark.
    """
    name, author = _check("name", name), _check("author", author)
    rng = random.Random(seed)
    dialogues: list[list[Message]] = []
    for language, twice_share in TWICE_ANSWERED.items():
        dialogues += _dialogues(_read(language), name, author, twice_share, rng)
    rng.shuffle(dialogues)
    return [
        Conversation(
            tuple(Message(message.role, _fill(message.content, name, author)) for message in dialogue),
            where=f"identity, record {number}",
        )
        for number, dialogue in enumerate(dialogues, start=1)
    ]


def _check(field: str, value: str) -> str:
    """The value without the space around it."""
    value = value.strip()
    if not value:
        raise UsageError(f"The identity's {field} is empty; give the {field} that the assistant shall say.")
    if len(value.splitlines()) > 1:
        raise UsageError(f"The identity's {field} {value!r} has several lines; give one line.")
    if len(value) > MAX_CHARACTERS:
        raise UsageError(
            f"The identity's {field} has {len(value)} characters; at most {MAX_CHARACTERS} are expected, so shorten it."
        )
    for mark in _TEMPLATE_MARKS:
        if mark in value:
            raise UsageError(f"The identity's {field} {value!r} holds the chat template mark '{mark}'; leave it out.")
    for placeholder in _PLACEHOLDERS:
        if placeholder in value:
            raise UsageError(f"The identity's {field} {value!r} holds the placeholder '{placeholder}'; leave it out.")
    return value


@functools.cache
def _read(language: str) -> _Texts:
    file = f"identity_{language}.yaml"
    text = (resources.files("lory.data") / "texts" / file).read_text(encoding="utf-8")
    return build(_Texts, parse_yaml(text, file), file)


def _fill(text: str, name: str, author: str) -> str:
    return text.replace("{name}", name).replace("{author}", author)


def _dialogues(texts: _Texts, name: str, author: str, twice_share: float, rng: random.Random) -> list[list[Message]]:
    """All conversations of one language, by topic, with the placeholders still in them."""
    turns: list[tuple[str, str]] = []
    later: list[int] = []  # which of the turns may stand second
    for title, topic in texts.topics.items():
        start = len(turns)
        turns += _turns(topic, _true_others(texts, name, author), twice_share, rng)
        if title != "greeting":  # nobody says hello in the middle of a conversation
            later += range(start, len(turns))
    second = set(rng.sample(later, round(SECOND_TURN_SHARE * len(turns))))
    with_system = set(rng.sample(range(len(turns)), round(SYSTEM_SHARE * len(turns))))

    dialogues = []
    for index, turn in enumerate(turns):
        system = [Message("system", rng.choice(texts.system))] if index in with_system else []
        exchanges = [rng.choice(texts.first_exchanges), turn] if index in second else [turn]
        messages = [(Message("user", question), Message("assistant", answer)) for question, answer in exchanges]
        dialogues.append([*system, *itertools.chain.from_iterable(messages)])
    return dialogues


def _turns(topic: _Topic, true_others: list[str], twice_share: float, rng: random.Random) -> list[tuple[str, str]]:
    """Each question of the topic with one answer or with two different ones."""
    questions = [text for text in topic.questions if not any(_mentions(text, other) for other in true_others)]
    twice = set(rng.sample(questions, round(twice_share * len(questions))))
    # going round a shuffled list uses all answers equally often and never gives a question the same one twice
    answers = itertools.cycle(rng.sample(topic.answers, len(topic.answers)))
    return [(question, next(answers)) for question in questions for _ in range(2 if question in twice else 1)]


def _true_others(texts: _Texts, name: str, author: str) -> list[str]:
    """The other assistants and makers that `name` or `author` really is: "Did Google make you?" must not get a no."""
    return [
        alias
        for aliases in texts.others
        if any(_mentions(name, known) or _mentions(author, known) for known in aliases)
        for alias in aliases
    ]


def _mentions(text: str, title: str) -> bool:
    """Whether the title stands in the text as a word; Chinese has no spaces, so only letters and digits join on."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(title)}(?![A-Za-z0-9])", text, re.IGNORECASE) is not None
