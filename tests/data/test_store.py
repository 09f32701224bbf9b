"""A store gives back what was put in, from disk, and keeps equal conversations once."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lory.data.encoding import store as stores
from lory.data.encoding.store import SAMPLES, Encoded, Store, Summary, Writer, digest_conversation, digest_question
from lory.runtime import LoryError
from lory.types import IGNORE, Conversation, Media, Message, Sample


def draw_sample(generator: random.Random, weighted: bool) -> Sample:
    ids = tuple(generator.randrange(2**31) for _ in range(generator.randint(2, 60)))
    learnt = [generator.random() < 0.6 for _ in ids]
    learnt[-1] = True
    labels = tuple(token if keep else IGNORE for token, keep in zip(ids, learnt, strict=True))
    weights = tuple(generator.choice([0.25, 1.0, 2.0]) if keep else 0.0 for keep in learnt)
    return Sample(ids, labels, weights if weighted else None)


def say(question: str, answer: str = "Yes.") -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), where=f"line of {question}")


def write(folder: Path, samples: list[Sample]) -> Store:
    with Writer(folder) as writer:
        for number, sample in enumerate(samples):
            record = say(f"{number}?")
            writer.add(record, digest_conversation(record), Encoded((sample,)))
        writer.finish(Summary(read=len(samples), fingerprint="of it all"))
    return Store(folder)


def test_samples_come_back_as_they_were_across_batches(tmp_path: Path) -> None:
    generator = random.Random(0)
    samples = [draw_sample(generator, weighted=number % 3 == 0) for number in range(2500)]
    store = write(tmp_path, samples)
    assert [store.sample(number) for number in range(len(store))] == samples
    assert store.lengths.tolist() == [len(sample) for sample in samples]
    assert store.supervised.tolist() == [sample.supervised for sample in samples]
    assert store.place(2400) == "line of 2400?"
    wanted = np.array([3, 1023, 1024, 2499])
    assert [ids.tolist() for group in store.ids(wanted) for ids in group] == [
        list(samples[number].input_ids) for number in wanted
    ]


def test_equal_conversations_share_their_samples(tmp_path: Path) -> None:
    sample = Sample((1, 2), (IGNORE, 2))
    with Writer(tmp_path) as writer:
        for where in ("a", "b"):
            record = Conversation(say("Hi").messages, where=where)
            digest = digest_conversation(record)
            assert writer.knows(digest) == (where == "b")
            writer.add(record, digest, None if where == "b" else Encoded((sample,)))
        writer.finish(Summary())
    store = Store(tmp_path)
    assert (len(store), store.first.tolist(), store.count.tolist()) == (1, [0, 0], [1, 1])
    assert (store.digests[0] == store.digests[1]).all()


def test_a_dropped_conversation_has_no_sample_and_is_counted_by_reason(tmp_path: Path) -> None:
    with Writer(tmp_path) as writer:
        for question in ("a", "b", "c"):
            record = say(question)
            samples = (Sample((1, 2), (IGNORE, 2)),) if question == "b" else ()
            writer.add(record, digest_conversation(record), Encoded(samples, "" if samples else "too long"))
        assert writer.dropped == {"too long": 2}
        writer.finish(Summary(dropped=writer.dropped))
    store = Store(tmp_path)
    assert (store.count.tolist(), store.summary.dropped) == ([0, 1, 0], Counter({"too long": 2}))
    assert store.reasons() == ["too long", None, "too long"]


def test_no_more_than_so_many_conversations_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_REMEMBERED", 2)
    with Writer(tmp_path) as writer:
        digests = [digest_conversation(say(question)) for question in "abc"]
        for question, digest in zip("abc", digests, strict=True):
            writer.add(say(question), digest, Encoded((Sample((1, 2), (IGNORE, 2)),)))
        assert [writer.knows(digest) for digest in digests] == [False, True, True]


def test_a_store_that_was_not_finished_is_none(tmp_path: Path) -> None:
    with Writer(tmp_path) as writer:
        writer.add(say("Hi"), b"0" * 16, Encoded(()))
    with pytest.raises(LoryError, match=r"summary\.json does not exist"):
        Store(tmp_path)


def test_an_empty_store_has_nothing(tmp_path: Path) -> None:
    store = write(tmp_path, [])
    assert (len(store), store.lengths.shape, store.digests.shape, store.questions.shape) == (0, (0,), (0, 2), (0,))


def test_digests_tell_contents_apart_and_places_not() -> None:
    one, other = say("Hi"), Conversation(say("Hi").messages, where="elsewhere")
    assert digest_conversation(one) == digest_conversation(other)
    different = [
        say("Hi", "No."),
        Conversation(one.messages, tools="[]"),
        Conversation(one.messages, rejected=(Message("assistant", "No."),)),
        Conversation((Message("user", "Hi"), Message("assistant", "Yes.", weight=0.5))),
        Conversation(text="Hi"),
        Conversation(text="Hi", label="greeting"),
    ]
    assert len({digest_conversation(record) for record in [one, *different]}) == 7


def test_a_question_is_the_first_thing_the_user_says_or_shows() -> None:
    system = Conversation((Message("system", "Be brief."), *say("Hi", "No.").messages))
    assert digest_question(system) == digest_question(say("Hi"))
    assert digest_question(say("Ho")) != digest_question(say("Hi"))
    shown = [
        Conversation((Message("user", "<image>", (Media("image", name),)), Message("assistant", "x")))
        for name in ("a.png", "b.png")
    ]
    assert digest_question(shown[0]) != digest_question(shown[1])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full disk to write to")
def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / SAMPLES).symlink_to("/dev/full")
    with pytest.raises(LoryError, match=r"samples\.arrow: the disk is full"):
        write(tmp_path, [Sample((1, 2), (IGNORE, 2))] * 3000)
