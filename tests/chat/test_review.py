"""The review queue: nothing decided is lost, whatever happens, and a person decides by single keys."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import pytest

from lory.chat import review
from lory.chat.review import ReviewItem, decide, enqueue, export_answers, export_preferences, pending, read_queue
from lory.data.sources.config import SourceConfig
from lory.data.sources.read import read_source
from lory.runtime import UsageError, lock_file


def item(question: str, answer: str, **values: Any) -> ReviewItem:
    return ReviewItem([{"role": "user", "content": question}], answer, **values)


LOOP = item("Who are you?", "I am. " * 9, reason="parroting: word", scores={"seq_rep_4": 0.9}, model="runs/x")
SHORT = item("Two and two?", "Five")
OTHER = item("Two and two?", "Four")


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    """A queue of three items."""
    path = tmp_path / "queue.jsonl"
    for one in (LOOP, SHORT, OTHER):
        enqueue(path, one)
    return path


def test_what_was_put_in_comes_out_in_order_and_once(queue: Path) -> None:
    assert pending(queue) == [LOOP, SHORT, OTHER]
    enqueue(queue, item("Who are you?", LOOP.answer, reason="another time"))
    assert pending(queue) == [LOOP, SHORT, OTHER]
    assert LOOP.time.endswith("+00:00")


def test_a_decision_takes_an_item_out_and_the_last_one_counts(queue: Path) -> None:
    decide(queue, SHORT.id, "accept")
    decide(queue, LOOP.id, "edit", "I am Lory.")
    assert pending(queue) == [OTHER]
    decide(queue, SHORT.id, "reject")
    assert [(r.decision, r.answer) for r in read_queue(queue)] == [
        ("edit", "I am Lory."),
        ("reject", "Five"),
        (None, "Four"),
    ]
    assert review.count_decisions(queue) == {"pending": 1, "accept": 0, "edit": 1, "reject": 1}


def test_the_file_is_only_ever_appended_to(queue: Path) -> None:
    before = queue.read_bytes()
    decide(queue, SHORT.id, "reject")
    assert queue.read_bytes().startswith(before)
    assert len(queue.read_bytes().splitlines()) == 4


def test_a_line_that_a_crash_cut_off_is_passed_over_and_then_replaced(queue: Path) -> None:
    whole = queue.read_bytes()
    queue.write_bytes(whole + b'{"decision": "acc')
    assert pending(queue) == [LOOP, SHORT, OTHER]
    decide(queue, SHORT.id, "accept")
    assert queue.read_bytes().startswith(whole)
    assert pending(queue) == [LOOP, OTHER]
    # a last line without its newline is whole all the same
    queue.write_bytes(queue.read_bytes().rstrip(b"\n"))
    decide(queue, LOOP.id, "reject")
    assert pending(queue) == [OTHER]


def test_many_may_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "queue.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: enqueue(path, item(f"{number}?", "x" * 5000)), range(40)))
    assert {one.prompt[0]["content"] for one in pending(path)} == {f"{number}?" for number in range(40)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: decide(path, "nothing", "accept"), "has no item 'nothing'"),
        (lambda path: decide(path, SHORT.id, "maybe"), "one of accept, edit, reject"),
        (lambda path: decide(path, SHORT.id, "edit", " "), "comes with the edited answer"),
        (lambda path: decide(path, SHORT.id, "accept", "Four"), "no other decision does"),
        (lambda path: enqueue(path, ReviewItem([], "answer")), "no messages under 'prompt'"),
        (lambda path: enqueue(path, ReviewItem([{"role": "parrot", "content": ""}], "")), "no messages under"),
        (lambda path: pending(path.with_name("none.jsonl")), "does not exist"),
        (lambda path: export_answers(path, path), "exists already"),
        (lambda path: export_answers(path, path.with_name("new.jsonl")), "no accepted or edited answer"),
        (lambda path: export_preferences(path, path.with_name("new.jsonl")), "no pair of a better and a worse"),
        (lambda path: review.run_review(path), "needs a terminal"),
    ],
)
def test_what_cannot_be_is_one_sentence(queue: Path, call: Any, message: str) -> None:
    before = queue.read_bytes()
    with pytest.raises(UsageError, match=message):
        call(queue)
    assert queue.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 4 is not valid JSON"),
        ("[]", "line 4 is neither"),
        ('{"decision": "accept", "id": "x"}', "line 4 is neither"),
        ('{"item": {"prompt": "Hi", "answer": "Hi"}}', "line 4 has no messages"),
        ('{"item": 3}', "line 4 has no messages"),
        (
            '{"item": {"prompt": [{"role": "user", "content": "?"}], "answer": "!", "scores": ["x"]}}',
            "line 4 has scores",
        ),
    ],
)
def test_a_damaged_line_is_named(queue: Path, line: str, message: str) -> None:
    with queue.open("a") as file:
        file.write(f"{line}\n\n")
    with pytest.raises(UsageError, match=message):
        pending(queue)


# Export


def test_accepted_and_edited_answers_become_training_data(queue: Path, tmp_path: Path) -> None:
    decide(queue, LOOP.id, "edit", "I am Lory.")
    decide(queue, SHORT.id, "reject")
    decide(queue, OTHER.id, "accept")
    assert export_answers(queue, tmp_path / "train.jsonl") == 2
    read = read_source(SourceConfig(path=str(tmp_path / "train.jsonl")))
    assert [[m.content for m in c.messages] for c in read.conversations] == [
        ["Who are you?", "I am Lory."],
        ["Two and two?", "Four"],
    ]


def test_edits_and_rejections_become_preference_pairs(queue: Path, tmp_path: Path) -> None:
    enqueue(queue, item("Alone?", "Bad"))
    decide(queue, item("Alone?", "Bad").id, "reject")  # nothing better is known
    decide(queue, LOOP.id, "edit", "I am Lory.")
    decide(queue, SHORT.id, "reject")
    decide(queue, OTHER.id, "accept")
    assert export_preferences(queue, tmp_path / "pairs.jsonl") == 2
    read = read_source(SourceConfig(path=str(tmp_path / "pairs.jsonl")))
    assert [(c.messages[-1].content, c.rejected[0].content) for c in read.conversations] == [
        ("I am Lory.", LOOP.answer),
        ("Four", "Five"),
    ]


# The terminal


@pytest.mark.parametrize(
    ("answer", "repeated"),
    [
        ("Well, no, no! No no NO no more now.", ["no", "no", "No", "no", "NO", "no"]),
        ("I am Lory. You are kind. I am Lory! I am lory. Yes.", ["I am Lory", "I am Lory", "I am lory"]),
        ("你好你好你好你好你好", ["你好"] * 5),
        ("Nothing is said twice here.", []),
        ("", []),
    ],
)
def test_the_repeated_part_is_found(answer: str, repeated: list[str]) -> None:
    assert [answer[start:end] for start, end in review.find_repeats(answer)] == repeated


@contextmanager
def terminal(path: Path, **environment: str) -> Iterator[pexpect.spawn]:
    """`run_review` at a pseudo-terminal."""
    program = f"from lory.chat.review import run_review; from pathlib import Path; run_review(Path({str(path)!r}))"
    unset = {name: value for name, value in os.environ.items() if name not in ("EDITOR", "VISUAL", "NO_COLOR")}
    variables = {**unset, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm-256color", **environment}
    child = pexpect.spawn(
        sys.executable, ["-c", program], encoding="utf-8", timeout=60, env=variables, dimensions=(40, 100)
    )
    try:
        yield child
    finally:
        child.close()


ASK = r"\[q\]uit"


def test_a_person_decides_leaves_and_goes_on_later(queue: Path) -> None:
    enqueue(queue, item("Bell?", "ding\x07\x1b[2Jdong"))
    with terminal(queue) as child:
        child.expect("1 of 4")
        child.expect("parroting: word · runs/x")
        child.expect("seq_rep_4 0.9")
        child.expect("Who are you\\?")
        child.expect("\x1b\\[30;43mI am\x1b")
        child.expect(ASK)
        child.send("xs")  # another key does nothing
        child.expect("2 of 4")
        child.expect(ASK)
        child.send("r")
        child.expect("3 of 4")
        child.expect(ASK)
        assert [r.decision for r in read_queue(queue)] == [None, "reject", None, None]
        child.send("a")
        child.expect("4 of 4")
        child.expect("ding␇␛\\[2Jdong")
        child.expect(ASK)
        child.send("q")
        child.expect("2 to review, 1 accepted, 0 edited, 1 rejected")
        child.expect(pexpect.EOF)
    with terminal(queue) as child:
        child.expect("1 of 2")
        child.expect("Who are you")
        child.expect(ASK)
        child.send("e")
        child.expect("Esc and then Enter")
        child.expect("I am")
        child.sendintr()
        child.expect("was not changed")
        child.expect(ASK)
        child.send("e")
        child.expect("Esc and then Enter")
        child.expect("I am")
        child.send("Good.\x1b\r")
        child.expect("2 of 2")
        child.expect(ASK)
        child.sendintr()
        child.expect("1 to review, 1 accepted, 1 edited")
        child.expect(pexpect.EOF)
    assert read_queue(queue)[0].answer == LOOP.answer + "Good."


def test_an_editor_of_ones_own_is_opened(queue: Path, tmp_path: Path) -> None:
    editor = tmp_path / "my editor.py"
    editor.write_text("import sys; open(sys.argv[-1], 'w').write('I am Lory.\\n\\nReally.\\n')")
    with terminal(queue, EDITOR=f"{sys.executable} '{editor}'") as child:
        child.expect(ASK)
        child.send("e")
        child.expect("2 of 3")
        child.expect(ASK)
        child.send("q")
        child.expect(pexpect.EOF)
    assert read_queue(queue)[0].answer == "I am Lory.\n\nReally."


def test_an_editor_that_fails_decides_nothing(queue: Path) -> None:
    with terminal(queue, VISUAL="/no/such/editor") as child:
        child.expect(ASK)
        child.send("e")
        child.expect("editor /no/such/editor failed")
        child.expect(ASK)
        child.send("q")
        child.expect(pexpect.EOF)
    assert pending(queue) == [LOOP, SHORT, OTHER]


def test_two_terminals_cannot_review_one_queue(queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(review, "is_terminal", lambda: True)
    with (
        lock_file(queue.with_name(f".{queue.name}.review.lock"), wait=False),
        pytest.raises(UsageError, match="under review in another terminal"),
    ):
        review.run_review(queue)
    enqueue(queue, item("Meanwhile?", "This may go on."))
    assert len(pending(queue)) == 4


def test_items_are_json_that_other_tools_can_read(queue: Path) -> None:
    first = json.loads(queue.read_text().splitlines()[0])["item"]
    assert first["id"] == LOOP.id
    assert first["prompt"] == [{"role": "user", "content": "Who are you?"}]
    assert (first["answer"], first["reason"], first["scores"]) == (LOOP.answer, LOOP.reason, {"seq_rep_4": 0.9})
