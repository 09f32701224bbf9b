"""The command line: exit codes, one sentence for whatever is wrong, and train, chat, merge, chat from end to end."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import typer.main
import yaml
from safetensors.torch import load_file, save_file

from lory import __version__, cli, export
from lory.assistant import load
from lory.chat.terminal import visible
from lory.config import build, parse_yaml
from lory.runtime import lock_file
from lory.training import demo
from lory.training.config import Config, list_bundled, read_config
from lory.training.run import RunResult, prepare

HEAVY = ("torch", "transformers", "matplotlib", "pyarrow", "accelerate", "numpy")


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as the one JSON object that it has to be."""
        return json.loads(self.out)


def lory(*arguments: object, stdin: str = "") -> Result:
    """Run `lory ARGUMENTS` by its real entry point, in this process; whatever is no exit is raised."""
    out, err, log = io.StringIO(), io.StringIO(), logging.getLogger("lory")
    before = log.handlers[:], log.propagate, log.level
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lory", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            log.handlers, log.propagate, log.level = before
    return Result(code, out.getvalue(), err.getvalue())


def lory_process(*arguments: object, stdin: str = "") -> Result:
    """Run `lory ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-m", "lory.cli", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


def list_commands() -> list[tuple[str, ...]]:
    """Every command and group, the program itself included."""
    group: Any = typer.main.get_command(cli.build_app())
    commands: list[tuple[str, ...]] = [()]
    for name, command in group.commands.items():
        commands += [(name,), *((name, below) for below in getattr(command, "commands", {}))]
    return commands


def list_files(folder: Path) -> dict[str, float]:
    """Everything in a folder, with when it was changed."""
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def config(tiny_model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of 9 steps in a folder of its own, whose runs go beside it."""
    folder = tmp_path_factory.mktemp("work")
    values = {
        "model": {"path": str(tiny_model)},
        "adapter": {"rank": 3, "alpha": 6},
        "data": {"train": [{"path": str(records)}], "max_tokens": 96, "eval_fraction": 0.25},
        "train": {"epochs": 3, "batch_size": 3, "learning_rate": 2e-2},
        "samples": {"prompts": ["3 and 7?"], "max_new_tokens": 9},
        "output": str(folder / "runs"),
    }
    path = folder / "sums.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def trained(config: Path) -> Result:
    """`lory train sums.yaml --json`, done."""
    return lory("train", config, "--json")


@pytest.fixture(scope="module")
def run(trained: Result) -> Path:
    """The folder of that run; do not write into it."""
    return Path(trained.json["folder"])


# Help


@pytest.mark.parametrize("command", list_commands(), ids=" ".join)
def test_every_command_has_help(command: Sequence[str]) -> None:
    result = lory(*command, "--help")
    assert (result.code, result.err) == (0, "")
    assert f"Usage: lory {' '.join(command)}".strip() in result.out
    assert lory(*command, "-h") == result


def test_help_loads_nothing_heavy() -> None:
    program = f"""
import sys
from lory.cli import main
for command in {list_commands()!r}:
    sys.argv = ["lory", *command, "--help"]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_version_is_the_packages() -> None:
    assert lory("--version") == Result(0, f"lory {__version__}\n", "")


# From end to end


def test_a_run_is_described_by_its_json(trained: Result, run: Path) -> None:
    assert trained.code == 0
    assert trained.json == {
        "folder": str(run),
        "steps": 9,
        "best_step": 9,
        "best_loss": pytest.approx(trained.json["best_loss"]),
    }
    assert (run / "checkpoint-9" / "MANIFEST.json").exists()
    assert (run / "plots" / "loss.png").exists()
    assert "step 9/9" in trained.err


def test_train_chat_merge_and_chat_again(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    question = "3 and 7?\n"
    answer = lory_process("chat", run, stdin=question)
    assert answer.code == 0
    assert answer.out == visible(load(run, device="cpu").chat(question.strip())) + "\n"
    assert answer.out != lory("chat", tiny_model, stdin=question).out
    merged = lory("merge", run, tmp_path / "merged", "--json")
    assert merged.code == 0
    assert merged.json["merged"] == 14
    assert merged.json["difference"] < 1e-5
    assert lory("chat", tmp_path / "merged", stdin=question).out == answer.out


def test_every_line_of_a_pipe_gets_an_answer(tiny_model: Path) -> None:
    result = lory("chat", tiny_model, "--system", "Be brief.", stdin=":conf max_new_tokens=5\nHi\n:exit\nHo\n")
    assistant = load(tiny_model, device="cpu")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    options = assistant.options.model_copy(update={"max_new_tokens": 5})
    assert result.out == visible(assistant.chat(messages, options)) + "\n"
    assert result.code == 0


def test_a_run_can_go_on_when_it_is_done(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "v0-copy"
    shutil.copytree(run, again, symlinks=True)
    result = lory("train", again, "--resume", "last", "--json")
    assert result.code == 0
    assert result.json["steps"] == 9
    assert "after step 9" in result.err


def test_a_merge_says_what_it_did(run: Path, tmp_path: Path) -> None:
    result = lory("merge", run, tmp_path / "m", "--dtype", "bfloat16", "--max-shard-size", "30KB")
    assert result.code == 0
    assert re.search(
        r"m: 14 of 21 tensors merged, 0\.00 GB in \d files; logits differ .* by at most \d\.\de-", result.out
    )


def test_plots_are_written_where_they_are_said_to_be(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other", symlinks=True)
    result = lory("plot", run, tmp_path / "other", "--out", tmp_path / "pictures", "--json")
    assert result.code == 0
    pictures = [Path(path) for path in result.json["pictures"]]
    assert sorted(pictures) == sorted((tmp_path / "pictures").iterdir())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert lory("plot", run, "--out", tmp_path / "one").out.splitlines()[0].endswith("one/loss.png")


# A look before training


def test_a_dry_run_shows_config_sample_and_counts_and_writes_nothing(config: Path) -> None:
    before = list_files(config.parent)
    result = lory("train", config, "train.epochs=5", "adapter.rank=2", "--dry-run")
    assert (result.code, result.err) == (0, "")
    shown, _, rest = result.out.partition("\n\n")
    expected, _ = read_config(config, ["train.epochs=5", "adapter.rank=2"])
    assert build(Config, parse_yaml(shown, "dry run"), "dry run") == expected
    assert re.search(r"\n⟦It is \d+\..*<\|im_end\|>⟧\n", rest)
    assert "24 read, 18 to train on, 6 to evaluate on" in rest
    assert re.search(r"\d+ rows, \d+ optimizer steps\nmemory, roughly: ", rest)
    assert list_files(config.parent) == before


def test_a_dry_run_as_json_is_the_same_in_numbers(config: Path) -> None:
    result = lory("train", config, "train.epochs=5", "--dry-run", "--json")
    assert set(result.json) == {"config", "samples", "data", "memory_bytes"}
    prepared = prepare(build(Config, result.json["config"], "json"))
    assert prepared.config.train.epochs == 5
    assert result.json["data"] == json.loads(json.dumps(prepared.report(prepared.plan())))
    assert [sample["input_ids"] for sample in result.json["samples"]] == [list(prepared.dataset.train[0].input_ids)]


def test_a_dry_run_promises_the_steps_that_training_takes(config: Path, trained: Result) -> None:
    assert lory("train", config, "--dry-run", "--json").json["data"]["steps"] == trained.json["steps"]


def test_data_show_prints_as_many_samples_as_asked(config: Path) -> None:
    text = lory("data", "show", config, "-n", 2).out
    # in the text, in the tokens, and in the sentence that explains it
    assert text.count("⟦") == text.count("learnt (in ⟦ ⟧)") * 3 == 6
    assert "model:" not in text
    samples = lory("data", "show", config, "-n", 2, "--json").json["samples"]
    assert len(samples) == 2
    assert samples[0]["learnt_text"] in samples[0]["text"]


def test_text_that_looks_like_markup_is_shown_as_it_is(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"query": "[bold]:cat:[/bold]", "response": "\\[x] :dog: [/]"}))
    result = lory("train", config, f"data.train.0.path={path}", "data.train.0.system=':cow: [i]'", "--dry-run")
    assert "[bold]:cat:[/bold]" in result.out
    assert "⟦\\[x] :dog: [/]<|im_end|>⟧" in result.out
    assert "system: ':cow: [i]'" in result.out


# Configs


def test_bundled_configs_are_listed_with_their_titles() -> None:
    assert "assistant            A new identity for the embedded model" in lory("configs", "list").out
    assert list(lory("configs", "list", "--json").json) == list(list_bundled())
    assert lory("configs", "list", "*parrot*", "--json").json == {}


def test_a_bundled_config_is_copied_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "assistant.yaml"
    assert lory("configs", "copy", "assistant", path.parent) == Result(0, f"{path}\n", "")
    assert path.read_text() == list_bundled()["assistant"]
    path.write_text("mine")
    again = lory("configs", "copy", "assistant", path.parent)
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "exists already" in again.err
    assert path.read_text() == "mine"


@pytest.mark.parametrize(("name", "folder"), [("assistent", "."), ("assistant", "file"), ("assistant", "file/below")])
def test_a_config_that_cannot_be_copied(name: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = lory("configs", "copy", name, tmp_path / folder)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def follow(schema: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """A schema with what its reference stands for."""
    return top["$defs"][schema["$ref"].rpartition("/")[2]] | schema if "$ref" in schema else schema


def check_against(schema: dict[str, Any], value: Any, top: dict[str, Any], place: str = "") -> None:
    """Every key of a config is a described property of the schema, which knows no other."""
    schema = follow(schema, top)
    options = [follow(option, top) for option in (schema, *schema.get("anyOf", []), *schema.get("oneOf", []))]
    if isinstance(value, dict):
        sections = [option for option in options if "properties" in option]
        # of a union, the kind that knows all of the keys
        section = next(section for section in sections if value.keys() <= section["properties"].keys())
        assert section["additionalProperties"] is False
        for key, item in value.items():
            assert follow(section["properties"][key], top)["description"], f"{place}.{key}"
            check_against(section["properties"][key], item, top, f"{place}.{key}")
    elif isinstance(value, list):
        items = next(option["items"] for option in options if "items" in option)
        for item in value:
            check_against(items, item, top, place)


def test_the_schema_knows_the_bundled_configs() -> None:
    schema = lory("configs", "schema").json
    assert set(schema["properties"]) == set(Config.model_fields)
    for text in list_bundled().values():
        check_against(schema, yaml.safe_load(text), schema)


# Whatever is wrong is said in one sentence, and nothing is written


@pytest.fixture
def work(config: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder with sums.yaml, whose runs would go to out/, as the working directory."""
    values = yaml.safe_load(config.read_text()) | {"output": "out"}
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "out").mkdir()
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def refuse(folder: Path, *arguments: object) -> str:
    """Run a command that is to be refused with exit code 2; returns its sentence."""
    before = list_files(folder)
    result = lory(*arguments)
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"[^\n]+[.?]\n", result.err), result.err
    assert list_files(folder) == before
    return result.err


GOOD = json.dumps({"instruction": "Say hi", "output": "hi"})
NUMBER = json.dumps({"instruction": "Say hi", "output": 5})

DATA = {
    "missing": ("missing.jsonl", None, r"missing\.jsonl does not exist"),
    "near": ("sums.yam", None, r"sums\.yam does not exist; did you mean 'sums\.yaml'\?"),
    "empty": ("empty.jsonl", "", r"empty\.jsonl is empty"),
    "blank": ("blank.jsonl", "\n\n", r"blank\.jsonl has no records"),
    "number": ("n.jsonl", f"{GOOD}\n{NUMBER}\n", r"n\.jsonl line 2.*output"),
    "list": ("l.jsonl", f"{GOOD}\n[1]\n", r"l\.jsonl line 2 is a list"),
    "keys": ("k.jsonl", '{"parrot": "squawk"}\n', r"k\.jsonl line 1.*parrot"),
    "array": ("a.json", f"[{GOOD},\n{GOOD}", r"a\.json line 2 is not valid JSON"),
    "latin": ("c.csv", b"query,response\nhi,ho\nn\xe4,ho\n", r"c\.csv line 3 is not UTF-8"),
    "cells": ("c.csv", "query,response\nhi\n", r"c\.csv row 1 \(line 2\) has 1 cells"),
    "ending": ("d.docx", "hi", r"d\.docx ends in '\.docx'"),
    "parquet": ("p.parquet", "hi", r"p\.parquet is no readable Parquet file"),
}


@pytest.mark.parametrize(("name", "content", "sentence"), DATA.values(), ids=DATA)
@pytest.mark.parametrize("command", [("train",), ("train", "--dry-run"), ("data", "show")], ids=" ".join)
def test_bad_data_is_refused(
    command: Sequence[str], name: str, content: str | bytes | None, sentence: str, work: Path
) -> None:
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert re.search(sentence, refuse(work, *command, "sums.yaml", f"data.train.0.path={name}"))


def test_a_broken_line_far_down_is_named(work: Path) -> None:
    with Path("long.jsonl").open("w") as file:
        file.writelines(f"{GOOD}\n" for _ in range(57_311))
        file.write(GOOD[:-1] + "\n")
        file.writelines(f"{GOOD}\n" for _ in range(100))
    assert "long.jsonl line 57312 is not valid JSON" in refuse(
        work, "train", "sums.yaml", "data.train.0.path=long.jsonl"
    )


def test_a_column_of_numbers_is_named(work: Path) -> None:
    table = pyarrow.table({"query": ["a", "b"], "response": [1, 2]})
    pyarrow.parquet.write_table(table, "numbers.parquet")
    sentence = refuse(work, "train", "sums.yaml", "data.train.0.path=numbers.parquet")
    assert re.search(r"numbers\.parquet row 1.*response", sentence)


USAGE = {
    "format": (["train", "sums.yaml", "data.train.0.format=alpacca"], r"'alpacca'.*did you mean 'alpaca'\?"),
    "key": (["train", "sums.yaml", "train.learning_rat=1"], r"unknown key.*did you mean 'train\.learning_rate'\?"),
    "section": (["train", "sums.yaml", "trian.epochs=1"], r"unknown key 'trian'; did you mean 'train'\?"),
    "place": (["train", "sums.yaml", "data.epochs=1"], r"did you mean 'train\.epochs'\?"),
    "value": (["train", "sums.yaml", "train.epochs=many"], r"'train\.epochs' was given 'many'"),
    "override": (["train", "sums.yaml", "epochs"], r"'epochs' was given; an override is section\.field=value"),
    "config": (["train", "sum.yaml"], r"did you mean 'sums\.yaml'\?"),
    "bundled": (["train", "assistent"], r"did you mean 'assistant'\?"),
    "model": (["train", "sums.yaml", "model.path=parrot"], r"'parrot' is no folder here"),
    "folder": (["train", "sums.yaml", "model.path=out"], r"out holds no .*config\.json"),
    "output": (["train", "sums.yaml", "output=sums.yaml"], r"sums\.yaml is a file; choose another folder"),
    "resume": (["train", "sums.yaml", "--resume", "last"], r"out holds .*no run"),
    "nowhere": (["train", "sums.yaml", "output=no/where", "--resume", "last"], r"no/where holds .*no run"),
    "chat": (["chat", "parrot"], r"'parrot' is no folder here"),
    "device": (["chat", "smollm2", "--device", "bad"], r"The device 'bad' cannot be used here"),
    "merge": (["merge", "parrot", "m"], r"'parrot' is no folder here"),
    "size": (["merge", "parrot", "m", "--max-shard-size", "many"], r"'many' was given as a size"),
    "plot": (["plot", "out"], r"out holds .*no run"),
}


@pytest.mark.parametrize(("arguments", "sentence"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_refused(arguments: Sequence[str], sentence: str, work: Path) -> None:
    assert re.search(sentence, refuse(work, *arguments))


def test_a_config_that_is_no_yaml_is_refused(work: Path) -> None:
    Path("bad.yaml").write_text("data:\n  train: [\n")
    assert re.search(r"bad\.yaml, line \d is not valid YAML", refuse(work, "train", "bad.yaml"))


def test_merging_what_has_no_adapter_is_refused(work: Path, tiny_model: Path, run: Path) -> None:
    assert "carries no adapter" in refuse(work, "merge", tiny_model, "m")
    Path("out/mine.txt").touch()
    assert "out exists already" in refuse(work, "merge", run, "out")
    assert "carries an adapter" in refuse(work, "train", "sums.yaml", f"model.path={run}")


def test_a_run_that_is_being_trained_is_left_alone(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "v0-copy", symlinks=True)
    with lock_file(tmp_path / "v0-copy" / ".lock", wait=False):
        sentence = refuse(tmp_path, "train", tmp_path / "v0-copy", "--resume", "last")
    assert "is in use by another training; wait until it has ended" in sentence


def test_a_changed_config_does_not_resume(config: Path, run: Path) -> None:
    before = list_files(run)
    result = lory("train", config, "train.epochs=4", "--resume", "last")
    assert result.code == 2
    assert "train.epochs was 3" in result.err
    assert list_files(run) == before


def test_dry_run_and_resume_exclude_each_other(work: Path) -> None:
    assert "--dry-run" in refuse(work, "train", "sums.yaml", "--dry-run", "--resume", "last")


@pytest.mark.parametrize(
    "arguments", [["parrot"], ["train"], ["train", "a", "--parrot"], ["chat", "a", "--dtype", "x"]]
)
def test_a_misspelt_command_line_exits_with_2(arguments: Sequence[str]) -> None:
    result = lory(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Usage: lory" in result.err


def test_a_process_exits_with_2_and_one_sentence() -> None:
    result = lory_process("train", "assistent")
    assert result == Result(2, "", result.err)
    assert result.err.splitlines() == [
        "'assistent' is no YAML file, no run's folder and no bundled config; did you mean 'assistant'?"
    ]


def test_what_fails_while_running_exits_with_1(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = export.merge_shards

    def spoil(base: Path, adapter: Path, out: Path, *rest: Any) -> Any:
        report = whole(base, adapter, out, *rest)
        tensors = load_file(out / "model.safetensors")
        save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, out / "model.safetensors")
        return report

    monkeypatch.setattr(export, "merge_shards", spoil)
    result = lory("merge", run, tmp_path / "m", "--json")
    assert (result.code, result.out) == (1, "")
    assert "differs from base and adapter" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("as_json", [False, True])
def test_the_demo_prints_its_result_once(as_json: bool, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(demo, "run_demo", lambda *arguments: asked.append(arguments) or RunResult(run, 9, 9, 1.0))
    result = lory("demo", "--name", "Polly", "--author", "me", "--out", "here", *["--json"] * as_json)
    assert asked == [("Polly", "me", Path("here"))]
    if as_json:
        assert result.json == {"folder": str(run), "steps": 9, "best_step": 9, "best_loss": 1.0}
    else:
        assert result.out == demo.describe_demo(run, Path("here")) + "\n"
