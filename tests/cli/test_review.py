"""`lory review` without a terminal: counts, and training data from what was decided."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lory import cli
from lory.chat.review import ReviewItem, decide, enqueue
from lory.cli import review
from lory.runtime import UsageError


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    """A queue of an edited, a rejected and a pending item."""
    path = tmp_path / "queue.jsonl"
    items = [ReviewItem([{"role": "user", "content": f"{number}?"}], f"Answer {number}.") for number in range(3)]
    for item in items:
        enqueue(path, item)
    decide(path, items[0].id, "edit", "Better.")
    decide(path, items[1].id, "reject")
    return path


def lory_review(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Result:
    # a program of one command would have no name for it
    monkeypatch.setattr(cli, "COMMANDS", (review.review, *cli.COMMANDS[:1]))
    return CliRunner().invoke(cli.build_app(), ["review", *map(str, arguments)])


def test_json_counts(queue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = lory_review(monkeypatch, queue, "--json")
    expected = {"path": str(queue), "pending": 1, "accept": 0, "edit": 1, "reject": 1}
    assert json.loads(result.stdout) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), {"messages": [{"role": "user", "content": "0?"}, {"role": "assistant", "content": "Better."}]}),
        (
            ("--preferences",),
            {"prompt": [{"role": "user", "content": "0?"}], "chosen": "Better.", "rejected": "Answer 0."},
        ),
    ],
)
def test_export_writes_what_was_decided(
    queue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], expected: object
) -> None:
    out = tmp_path / "train.jsonl"
    result = lory_review(monkeypatch, queue, "--export", out, "--json", *flags)
    assert json.loads(result.stdout) == {"path": str(out), "records": 1}
    assert json.loads(out.read_text()) == expected
    again = lory_review(monkeypatch, queue, "--export", out, *flags)
    assert isinstance(again.exception, UsageError)
    assert "exists already" in str(again.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--preferences",), "without --export"), ((), "needs a terminal")],
)
def test_wrong_usage_is_one_sentence(
    queue: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    error = lory_review(monkeypatch, queue, *arguments).exception
    assert isinstance(error, UsageError)
    assert message in str(error)
