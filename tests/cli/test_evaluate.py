"""`lory eval`: what is printed, what is written, and one sentence for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from lory import cli
from lory.chat.review import pending
from lory.cli import evaluate
from lory.runtime import UsageError


@pytest.fixture
def lory_eval(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `lory eval ARGUMENTS`."""
    monkeypatch.setattr(cli, "COMMANDS", (evaluate.eval, *cli.COMMANDS[:1]))

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(cli.build_app(), ["eval", *map(str, arguments)])

    return run


def test_json_has_every_source_and_the_whole(lory_eval: Any, tiny_adapter: Path, records: Path) -> None:
    result = lory_eval(tiny_adapter, "--data", records, "--data", f"{records}#5", "-n", 7, "--json")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert found["model"] == str(tiny_adapter)
    assert [scores["records"] for scores in found["sources"].values()] == [7, 5]
    assert found["all"]["prediction"]["tokens"] > 0
    assert found["interrupted"] is False


def test_answers_are_written_shown_and_queued(lory_eval: Any, tiny_model: Path, tmp_path: Path) -> None:
    data, out, queue = tmp_path / "data.jsonl", tmp_path / "out", tmp_path / "queue.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    data.write_text(json.dumps({"messages": messages}) + "\n")
    arguments = (tiny_model, "--data", data, "--generate", "--max-new-tokens", 4, "--out", out, "--review", queue)
    result = lory_eval(*arguments)
    assert result.exit_code == 0, result.exception
    for line in ("prediction.loss", "prediction.rep ", "answers.edit_distance", "answers.parroting.evasion"):
        assert any(shown.startswith(line) for shown in result.stdout.splitlines()), line
    assert "rep/16" not in result.stdout
    assert "0 answers were put into the review queue" in result.stdout
    scores = json.loads((out / "scores.json").read_text())
    assert scores["settings"]["options"]["max_new_tokens"] == 4
    assert scores["sources"]["data.jsonl"]["answers"]["answers"] == 1
    again = lory_eval(*arguments)
    assert isinstance(again.exception, UsageError)
    assert "exists already" in str(again.exception)


def test_parroted_and_empty_answers_are_queued(tmp_path: Path) -> None:
    from lory.evaluate.answers import Prediction
    from lory.evaluate.run import Evaluation

    prompt = [{"role": "user", "content": "Hi"}]
    made = [
        Prediction("s", "answer", "line 1", prompt, "Hello", "no " * 9, parroting=["word"]),
        Prediction("s", "answer", "line 2", prompt, "Hello", " "),
        Prediction("s", "answer", "line 3", prompt, "Hello", "Hello"),
        Prediction("s", "record", "line 4", prompt, "Hello"),
    ]
    assert evaluate._enqueue(Evaluation("m", {}, {}, made, [], False), tmp_path / "queue.jsonl") == 2
    items = pending(tmp_path / "queue.jsonl")
    assert [(item.reason, item.model) for item in items] == [("parroting: word", "m"), ("empty", "m")]


def test_the_identity_set_takes_a_name(lory_eval: Any, tiny_model: Path) -> None:
    result = lory_eval(tiny_model, "--data", "identity#3", "--name", "Polly", "--author", "Acme", "--json")
    assert json.loads(result.stdout)["sources"]["identity"]["records"] == 3


def test_a_source_may_have_its_long_form_and_labels_are_scored_as_classes(
    lory_eval: Any, tiny_model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "labels.csv"
    data.write_text("text,label\n" + "good film,positive\nbad film,negative\n" * 4)
    long = f"{{path: {data}, columns: {{prompt: text, completion: label}}}}"
    result = lory_eval(tiny_model, "--data", long, "--generate", "--max-new-tokens", 3, "--json")
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)["sources"]["labels.csv"]["answers"]["classification"]
    assert (found["classes"], found["unknown"], found["accuracy"]) == (2, 8, 0.0)


def test_only_tasks_need_no_data(lory_eval: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lory.evaluate.tasks.run_tasks", lambda *_: {"arc": {"alias": "arc", "acc,none": 0.25}})
    assert json.loads(lory_eval(tiny_model, "--tasks", "arc", "--json").stdout)["tasks"]["arc"]["acc,none"] == 0.25
    assert "acc,none                 0.25" in lory_eval(tiny_model, "--tasks", "arc").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Neither --data nor --tasks"),
        (["--tasks", "arc", "--generate"], "--generate was given without --data"),
        (["--tasks", "arc", "--out", "x"], "--out was given without --data"),
        (["--data", "{records}", "--temperature", "1"], "--temperature was given without --generate"),
        (["--data", "{records}", "--seed", "0"], "--seed was given without --generate"),
        (["--data", "{records}", "--answers", "2"], "--answers was given without --generate"),
        (["--data", "{records}", "--review", "q.jsonl"], "--review was given without --generate"),
        (["--data", "{records}", "--generate", "--temperature", "0"], "'temperature' was given 0.0"),
        (["--data", "{records}", "--greedy-continuation", "50"], "as 50:100"),
        (["--data", "{records}", "--greedy-continuation", "0:9"], "as 50:100"),
        (["--data", "{records}", "--greedy-continuation", "500:100"], "exceed the context, 512"),
        (["--data", "identity"], "needs both a name and an author"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        (["--data", "{records}", "--out", "{records}"], "exists already"),
    ],
)
def test_wrong_usage_is_one_sentence(
    lory_eval: Any, tiny_model: Path, records: Path, arguments: list[str], message: str
) -> None:
    error = lory_eval(tiny_model, *(text.format(records=records) for text in arguments)).exception
    assert isinstance(error, UsageError), error
    assert message in str(error)


def test_ctrl_c_is_told_and_is_no_success(
    lory_eval: Any, tiny_model: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lory.evaluate import run

    def stop(*_: Any, **__: Any) -> run.Evaluation:
        return run.Evaluation("m", {}, {}, [], [], interrupted=True)

    monkeypatch.setattr(run, "evaluate", stop)
    result = lory_eval(tiny_model, "--data", records, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["interrupted"] is True


def test_the_command_is_called_eval() -> None:
    app = typer.Typer()
    app.command()(evaluate.eval)
    assert typer.main.get_command(app).name == "eval"
