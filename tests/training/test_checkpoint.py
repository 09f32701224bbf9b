"""Interrupted is uninterrupted: runs that are killed, resumed, or refused, and checkpoints that are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lory.models.resolve import list_checkpoints
from lory.runtime import LoryError, UsageError
from lory.training import checkpoint, loop
from lory.training.checkpoint import check_manifest, point_link
from lory.training.loop import Loop
from lory.training.run import train

STEP_NUMBERS = ("loss", "learning_rate", "grad_norm", "token_accuracy", "supervised_tokens")

# Trains in a child process that kills itself, with SIGKILL, at a given call into lory: anywhere between two lines of
# the loop, of a save, of a log, as a power cut would have it. Counting calls makes the moments repeatable and spreads
# them over short and long functions alike. Without a number it trains to the end. Imports are made once, then forked.
KILLED = textwrap.dedent(
    """
    import json, os, signal, sys

    import lory.training.run as run

    def count_and_kill(limit):
        count = 0
        def note(frame, event, argument):
            nonlocal count
            if "/lory/training/" in frame.f_code.co_filename or "/lory/runtime" in frame.f_code.co_filename:
                count += 1
                if count == limit:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(note)
        return lambda: count

    def attempt(config, limit):
        ours, theirs = os.pipe()
        if (pid := os.fork()) == 0:
            sys.stderr = open(os.devnull, "w")
            counted = count_and_kill(limit)
            try:
                started = list(run.Path(config["output"]).glob("v*/config.yaml"))
                result = run.train(config, resume="last" if started else None)
                os.write(theirs, json.dumps([counted(), str(result.folder)]).encode())
                os._exit(0)
            except BaseException as error:
                os.write(theirs, json.dumps([0, repr(error)]).encode())
                os._exit(1)
        os.close(theirs)
        status = os.waitpid(pid, 0)[1]
        with os.fdopen(ours) as file:
            said = file.read()
        return (json.loads(said) if said else [None, None]), status

    run.plot_runs = lambda *arguments: None
    config, limits = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    # what is imported late is imported now, once for all
    import torch.utils.tensorboard
    run.load_model(run.prepare(run.build(run.Config, config, "config")).resolved)
    for limit in limits:
        (count, said), status = attempt(config, limit)
        if os.WIFEXITED(status):
            break
    else:
        (count, said), status = attempt(config, 0)
    print(json.dumps({"calls": count, "said": said, "failed": status != 0}))
    """
)


def train_killed(config: dict[str, Any], calls: list[int]) -> dict[str, Any]:
    """Train in processes that are killed after so many calls each, one after the other, and at last to the end."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(config), json.dumps(calls)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert not result["failed"], result["said"]
    return result


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_numbers(run: Path) -> list[Any]:
    """What log.jsonl says, without what depends on the clock and the machine."""
    return [
        (entry["step"], entry["eval"] if "eval" in entry else [entry[name] for name in STEP_NUMBERS])
        for entry in read_lines(run / "log.jsonl")
    ]


def read_files(run: Path) -> dict[str, bytes | str]:
    """The checkpoints of a run, byte by byte, its links, and anything that should not have been left behind."""
    found: dict[str, bytes | str] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file() and name.startswith(("checkpoint-", ".checkpoint-")):
            found[name] = path.read_bytes()
    return found


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_is_the_run_that_was_never_stopped(
    small_run: dict[str, Any], tmp_path: Path
) -> None:
    small_run["data"]["eval_fraction"] = 0.2
    small_run["train"]["eval_every_steps"] = 4
    small_run["samples"] = {"prompts": ["3 and 7?"], "every_steps": 4, "max_new_tokens": 3}
    whole = train_killed(small_run | {"output": str(tmp_path / "whole")}, [])
    calls = whole["calls"]
    assert calls > 5000
    # before the first step, in the middle, near the end, and once more from where that led
    moments = [calls // 9, int(calls * 0.52), int(calls * 0.31), int(calls * 0.47), calls // 3]
    killed = train_killed(small_run | {"output": str(tmp_path / "killed")}, moments)
    one, other = Path(whole["said"]), Path(killed["said"])
    assert len(list((tmp_path / "killed").iterdir())) == 1
    files = read_files(one)
    assert "checkpoint-10/adapter_model.safetensors" in files
    assert read_files(other) == files
    assert read_numbers(other) == read_numbers(one)
    assert [step for step, value in read_numbers(other) if isinstance(value, list)] == list(range(1, 11))
    assert read_lines(other / "samples.jsonl") == read_lines(one / "samples.jsonl")


class Crash(BaseException):
    """Stands for a kill inside of the test's own process."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the next run die right before its optimizer step number `step` (from 1)."""
    take_step = Loop._take_step

    def crash(self: Loop, position: Any) -> Any:
        if position.step == step - 1:
            raise Crash
        return take_step(self, position)

    monkeypatch.setattr(Loop, "_take_step", crash)


def stopped_run(config: dict[str, Any], step: int) -> Path:
    """The folder of a run that died before this step."""
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(Crash):
            train(config)
    return next(Path(config["output"]).glob("v*"))


def test_a_resume_goes_on_with_weights_moments_rate_order_and_random_numbers(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    whole = train(quick | {"output": str(tmp_path / "whole")}).folder
    run = stopped_run(quick, step=8)
    assert os.readlink(run / "last") == "checkpoint-6"
    result = train(quick, resume="last")
    assert (result.folder, result.steps) == (run, 12)
    assert read_files(run) == read_files(whole)
    assert read_numbers(run) == read_numbers(whole)


def test_what_a_checkpoint_holds(quick: dict[str, Any]) -> None:
    run = stopped_run(quick, step=4)
    folder = run / "checkpoint-3"
    names = {path.name for path in folder.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "training_state.json",
        "tokenizer_config.json",
        "generation_config.json",
        "MANIFEST.json",
    } <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert set(json.loads((folder / "MANIFEST.json").read_text())["sha256"]) == names - {"MANIFEST.json"}
    check_manifest(folder)
    state = json.loads((folder / "training_state.json").read_text())
    assert state["position"]["step"] == 3
    moments = load_file(folder / "optimizer.safetensors")
    assert {name.partition(".")[2] for name in moments} == {"step", "exp_avg", "exp_avg_sq"}


def test_a_run_killed_before_its_first_checkpoint_starts_over_in_its_folder(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    quick["data"]["eval_fraction"] = 0.2
    quick["samples"] = {"prompts": ["3 and 7?"], "every_steps": 100, "max_new_tokens": 3}
    whole = train(quick | {"output": str(tmp_path / "whole")}).folder
    run = stopped_run(quick, step=2)
    assert train(quick, resume="last").folder == run
    assert read_numbers(run) == read_numbers(whole)
    assert read_lines(run / "samples.jsonl") == read_lines(whole / "samples.jsonl")
    assert read_files(run) == read_files(whole)


def test_resuming_a_finished_run_changes_nothing(quick: dict[str, Any]) -> None:
    quick["samples"] = {"prompts": ["3 and 7?"], "every_steps": 7, "max_new_tokens": 3}
    run = train(quick).folder
    before = read_files(run), (run / "log.jsonl").read_bytes(), (run / "samples.jsonl").read_bytes()
    assert [entry["step"] for entry in read_lines(run / "samples.jsonl")] == [0, 7, 12]
    assert train(quick, resume="last").steps == 12
    assert (read_files(run), (run / "log.jsonl").read_bytes(), (run / "samples.jsonl").read_bytes()) == before


def set_eval_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Let the next evaluations, that of step 0 included, give these losses."""
    given = iter(losses)
    monkeypatch.setattr(loop, "evaluate_loss", lambda *_: torch.tensor([next(given), 0.0, 1.0]))


def test_resuming_a_run_that_stopped_early_takes_no_further_step(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_eval_losses(monkeypatch, [5.0, 4.0, 4.5])
    quick["data"]["eval_fraction"] = 0.2
    quick["train"] |= {"eval_every_steps": 1, "early_stop_evals": 1}
    first = train(quick)
    assert first.steps == 2
    before = read_files(first.folder), (first.folder / "log.jsonl").read_bytes()
    assert train(quick, resume="last").steps == first.steps
    assert (read_files(first.folder), (first.folder / "log.jsonl").read_bytes()) == before


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.learning_rate=0.02", r"train\.learning_rate was 0\.01 .* and is 0\.02 now"),
        ("train.batch_size=4", r"train\.batch_size was 2 .* and is 4 now"),
        ("train.accumulate=1", r"train\.accumulate was 2"),
        ("train.epochs=3", r"train\.epochs was 2"),
        ("train.seed=1", r"train\.seed was 0"),
        ("train.eval_every_steps=3", r"train\.eval_every_steps was 500"),
        ("adapter.rank=4", r"adapter\.rank was 3 .* and is 4 now"),
        ("adapter.dropout=0", r"adapter\.dropout was 0\.1"),
        ("adapter.targets=[q_proj]", r"adapter\.targets was 'all-linear' .* and is \['q_proj'\] now"),
        ("data.train.0.path={copy}", r"data\.train\.0\.path was '.*sums\.jsonl' .* and is '.*copy\.jsonl' now"),
        ("data.max_tokens=95", r"data\.max_tokens was 96"),
        ("data.packing=true", r"data\.packing was False"),
        ("model.dtype=bfloat16", r"model\.dtype was 'auto'"),
    ],
)
def test_a_changed_field_is_refused_by_name(
    stopped: tuple[dict[str, Any], Path], records: Path, tmp_path: Path, override: str, sentence: str
) -> None:
    config, run = stopped
    copy = shutil.copy(records, tmp_path / "copy.jsonl")
    before = read_files(run)
    with pytest.raises(UsageError, match=sentence):
        train(config, [override.format(copy=copy)], resume="last")
    assert read_files(run) == before


@pytest.fixture(scope="module")
def stopped(tiny_model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The config and folder of a run that died before its 8th step, with checkpoints 3 and 6; do not change it."""
    config = {
        "model": {"path": str(tiny_model)},
        "adapter": {"rank": 3, "alpha": 6, "dropout": 0.1},
        "data": {"train": [{"path": str(records)}], "max_tokens": 96, "packing": False},
        "train": {"epochs": 2, "batch_size": 2, "accumulate": 2, "learning_rate": 1e-2, "save_every_steps": 3},
        "output": str(tmp_path_factory.mktemp("stopped") / "runs"),
    }
    return config, stopped_run(config, step=8)


def copy_run(stopped: tuple[dict[str, Any], Path], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    config, run = stopped
    folder = Path(shutil.copytree(run, tmp_path / "runs" / run.name, symlinks=True))
    config = config | {"output": str(tmp_path / "runs")}
    return config, folder


def test_free_fields_may_change(stopped: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    config, run = copy_run(stopped, tmp_path)
    free = [
        "train.log_every_steps=1",
        "train.save_every_steps=5",
        "train.keep_checkpoints=1",
        "samples.prompts=['3 and 7?']",
        "samples.max_new_tokens=2",
    ]
    assert train(config, free, resume="last").steps == 12
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-12"]


def test_changed_data_under_the_same_path_is_refused(quick: dict[str, Any], records: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(records, tmp_path / "sums.jsonl"))
    quick["data"]["train"] = [{"path": str(path)}]
    stopped_run(quick, step=5)
    path.write_text(path.read_text().replace("It is 9.", "It is 8."))
    with pytest.raises(UsageError, match=r"the data of sums\.jsonl has changed since"):
        train(quick, resume="last")


def test_a_changed_template_is_refused(quick: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    quick["model"]["path"] = str(model)
    stopped_run(quick, step=5)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("'\\n'", "' '"))
    with pytest.raises(UsageError, match=r"what the data becomes \(tokenizer, template or code\) has changed"):
        train(quick, resume="last")


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors", "training_state.json"]
)
def test_a_flipped_bit_is_noticed_and_mended_from_an_earlier_checkpoint(
    stopped: tuple[dict[str, Any], Path], tmp_path: Path, name: str
) -> None:
    config, run = copy_run(stopped, tmp_path)
    whole = (run / "checkpoint-6" / name).read_bytes()
    (run / "checkpoint-6" / name).write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(UsageError, match=rf"checkpoint-6/{name} is not what its MANIFEST\.json says \(SHA-256\)"):
        train(config, resume="last")
    config["train"] = config["train"] | {"keep_checkpoints": 9}
    assert train(config, resume="checkpoint-3").steps == 12
    assert (run / "checkpoint-6" / name).read_bytes() == whole
    check_manifest(run / "checkpoint-6")


def test_a_missing_file_is_noticed(stopped: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    config, run = copy_run(stopped, tmp_path)
    (run / "checkpoint-6" / "rng.safetensors").unlink()
    with pytest.raises(UsageError, match=r"checkpoint-6 lacks rng\.safetensors, which its MANIFEST\.json lists"):
        train(config, resume="last")


def test_a_checkpoint_without_manifest_is_passed_over(stopped: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    config, run = copy_run(stopped, tmp_path)
    (run / "checkpoint-6" / "MANIFEST.json").unlink()
    # as an interrupted save leaves it
    shutil.copytree(run / "checkpoint-3", run / ".checkpoint-9.abc.tmp")
    with pytest.raises(UsageError, match="has no whole 'checkpoint-6'; there are: checkpoint-3"):
        train(config, resume="checkpoint-6")
    train(config, resume="last")
    assert min(entry["step"] for entry in read_lines(run / "log.jsonl")) == 1
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-9", "checkpoint-12"]
    assert not list(run.glob(".checkpoint-*"))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_and_the_best(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    set_eval_losses(monkeypatch, [5.0, 9.0, 4.0, 6.0, 3.0, 8.0, 8.0])
    quick["data"]["eval_fraction"] = 0.2
    quick["train"] |= {"epochs": 3, "eval_every_steps": 2, "save_every_steps": 2, "keep_checkpoints": keep}
    quick["train"]["max_steps"] = 12
    result = train(quick)
    assert (result.best_step, result.best_loss) == (8, 3.0)
    expected = sorted({8, *range(14 - 2 * keep, 13, 2)})
    assert [folder.name for folder in list_checkpoints(result.folder)] == [f"checkpoint-{step}" for step in expected]
    assert os.readlink(result.folder / "best") == "checkpoint-8"
    assert os.readlink(result.folder / "last") == "checkpoint-12"


def test_a_link_is_relative_and_replaced_at_once(tmp_path: Path) -> None:
    for name in ("checkpoint-3", "checkpoint-6"):
        (tmp_path / name).mkdir()
        point_link(tmp_path / "last", tmp_path / name)
        assert os.readlink(tmp_path / "last") == name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-6", "last"]


def fail_from(count: int, error: Exception, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which raises `error` from its call number `count` on."""
    calls = 0

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= count:
            raise error
        return function(*arguments, **named)

    return failing


@pytest.mark.parametrize(
    ("where", "error", "sentence"),
    [
        # two files a checkpoint go through this name
        ("save_file", SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        ("save_file", OSError(errno.ENOSPC, "No space left on device"), "the disk is full; free some space"),
        ("write_json", OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
    ],
)
def test_a_full_disk_leaves_the_earlier_checkpoint_whole(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch, where: str, error: Exception, sentence: str
) -> None:
    # the fourth call is in the middle of the second checkpoint
    monkeypatch.setattr(checkpoint, where, fail_from(4, error, getattr(checkpoint, where)))
    with pytest.raises(LoryError, match=sentence) as raised:
        train(quick)
    assert raised.value.exit_code == 1
    run = next(Path(quick["output"]).glob("v*"))
    assert [path.name for path in run.iterdir() if "checkpoint" in path.name] == ["checkpoint-3"]
    check_manifest(run / "checkpoint-3")
    assert os.readlink(run / "last") == "checkpoint-3"
    monkeypatch.undo()
    monkeypatch.setattr("lory.training.run.plot_runs", lambda *_: [])
    assert train(quick, resume="last").steps == 12


def test_another_number_of_processes_is_refused(stopped: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    config, run = copy_run(stopped, tmp_path)
    folder = run / "checkpoint-6"
    state = json.loads((folder / "training_state.json").read_text())
    (folder / "training_state.json").write_text(json.dumps(state | {"processes": 4}))
    checkpoint._write_manifest(folder)
    with pytest.raises(UsageError, match="was written by 4 processes, and this run has 1"):
        train(config, resume="last")


def test_each_rank_gets_its_own_random_numbers_back() -> None:
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
    for rank in range(3):
        rank_of = SimpleNamespace(process_index=rank, device=torch.device("cpu"))
        checkpoint._restore_rng({"cpu": torch.stack(states)}, rank_of)  # type: ignore[arg-type]
        drawn = torch.rand(5)
        torch.manual_seed(rank)
        assert torch.equal(drawn, torch.rand(5))


def test_a_run_from_before_a_field_was_there_goes_on(quick: dict[str, Any]) -> None:
    run = stopped_run(quick, step=8)
    config = run / "config.yaml"
    lines = config.read_text(encoding="utf-8").splitlines()
    older = [line for line in lines if not line.strip().startswith("optimizer:")]
    assert len(older) == len(lines) - 1
    config.write_text("\n".join(older) + "\n", encoding="utf-8")
    assert train(quick, resume="last").steps == 12
