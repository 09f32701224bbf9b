"""The loop: every sample once an epoch, evaluations that stop it, signals that end it well, losses that may not be."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lory.models.resolve import list_checkpoints
from lory.runtime import LoryError
from lory.training import loop
from lory.training.loop import Interrupted, Loop, catch_signals
from lory.training.optim import TrainConfig, build_optimizer, build_schedule
from lory.training.run import train


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_rate_rises_to_its_peak_and_goes_where_the_schedule_says(name: Any) -> None:
    config = TrainConfig(schedule=name, warmup=0.2, learning_rate=0.5)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config)
    schedule = build_schedule(optimizer, config, total_steps=20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    expected = {
        "cosine": [0.25 * (1 + math.cos(math.pi * (step - 4) / 16)) for step in range(4, 20)],
        "linear": [0.5 * (20 - step) / 16 for step in range(4, 20)],
        "constant": [0.5] * 16,
    }
    assert rates[4:] == pytest.approx(expected[name])


def test_vectors_are_not_decayed() -> None:
    groups = build_optimizer(torch.nn.Linear(3, 3), TrainConfig(weight_decay=0.1)).param_groups
    assert [(group["weight_decay"], [p.ndim for p in group["params"]]) for group in groups] == [(0.1, [2]), (0.0, [1])]


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Loop], object]) -> None:
    """Let `act` happen just before optimizer step number `step` (from 1) is taken."""
    take_step = Loop._take_step

    def take(self: Loop, position: Any) -> Any:
        if position.step == step - 1:
            act(self)
        return take_step(self, position)

    monkeypatch.setattr(Loop, "_take_step", take)


@pytest.mark.parametrize("wanted", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end_saves_and_says_how_to_go_on(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch, wanted: signal.Signals, tmp_path: Path
) -> None:
    whole = train(quick | {"output": str(tmp_path / "whole")}).folder
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        before_step(patch, 5, lambda _: os.kill(os.getpid(), wanted))
        with pytest.raises(Interrupted) as raised:
            train(quick)
    run = next(Path(quick["output"]).glob("v*"))
    assert str(raised.value) == (
        f"Stopped by {wanted.name} after step 5 of 12, which is saved; to go on: lory train {run} --resume last"
    )
    assert raised.value.exit_code == 1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert os.readlink(run / "last") == "checkpoint-5"
    assert [entry["step"] for entry in read_log(run)] == [1, 2, 3, 4, 5]
    train(run, resume="last")
    weights = "checkpoint-12/adapter_model.safetensors"
    assert (run / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_signal_during_the_last_step_is_too_late(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before_step(monkeypatch, 12, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert train(quick).steps == 12


def test_the_second_signal_acts_at_once() -> None:
    with catch_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_sigterm_ends_the_command_with_exit_code_1(small_run: dict[str, Any], tmp_path: Path) -> None:
    small_run["train"] |= {"epochs": 2000}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(small_run), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-c", "from lory.cli import main; main()", "train", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if line.startswith("step 2/"):
            process.terminate()
            break
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "SIGTERM: finishing this step and saving" in said
    run = next(Path(small_run["output"]).glob("v*"))
    step = list_checkpoints(run)[-1].name.partition("-")[2]
    assert said.splitlines()[-1] == (
        f"Stopped by SIGTERM after step {step} of 12000, which is saved; to go on: lory train {run} --resume last"
    )


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_checkpoint(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(self: Loop) -> None:
        with torch.no_grad():
            self.parts.model.lm_head.weight.fill_(math.nan)

    before_step(monkeypatch, 5, spoil)
    with pytest.raises(LoryError, match=r"The loss is nan and the gradient norm \S+ at step 5: the run stopped"):
        train(quick)
    run = next(Path(quick["output"]).glob("v*"))
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint-3"]
    assert [entry["step"] for entry in read_log(run)] == [1, 2, 3, 4]


def set_eval_losses(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Let the evaluations, that of step 0 first, give these losses."""
    given = iter(losses)
    monkeypatch.setattr(loop, "evaluate_loss", lambda *_: torch.tensor([next(given), 0.0, 1.0]))


def test_it_stops_when_so_many_evaluations_brought_no_lower_loss(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # the loss of step 0 is lower than all and does not count; an equal one is not lower
    set_eval_losses(monkeypatch, [1.0, 5.0, 4.0, 4.5, 3.0, 3.0, 3.5, 2.0])
    quick["data"]["eval_fraction"] = 0.2
    quick["train"] |= {"eval_every_steps": 1, "early_stop_evals": 2, "save_every_steps": 100}
    quick["samples"] = {"prompts": ["3 and 7?"], "every_steps": 100, "max_new_tokens": 2}
    result = train(quick)
    assert (result.steps, result.best_step, result.best_loss) == (6, 4, 3.0)
    assert os.readlink(result.folder / "best") == "checkpoint-4"
    assert os.readlink(result.folder / "last") == "checkpoint-6"
    samples = (result.folder / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [0, 6]


def test_without_patience_it_goes_on(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    set_eval_losses(monkeypatch, [float(loss) for loss in range(99)])
    quick["data"]["eval_fraction"] = 0.2
    quick["train"] |= {"eval_every_steps": 1}
    assert train(quick).steps == 10


def test_evaluations_come_before_training_at_their_steps_and_at_the_end(quick: dict[str, Any]) -> None:
    quick["data"]["eval_fraction"] = 0.2
    quick["train"] |= {"eval_every_steps": 4}
    log = read_log(train(quick).folder)
    assert [entry["step"] for entry in log if "eval" in entry] == [0, 4, 8, 10]
    values = log[0]["eval"]
    assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
    # rate and loss of a step are those it was taken with, told before its evaluation
    assert [("eval" in entry) for entry in log if entry["step"] == 4] == [False, True]


def test_each_evaluation_source_is_told_apart_and_the_whole_is_weighted(quick: dict[str, Any], tmp_path: Path) -> None:
    lines = Path(quick["data"]["train"][0]["path"]).read_text().splitlines()
    for name, part in {"few.jsonl": lines[:2], "many.jsonl": lines[2:9]}.items():
        (tmp_path / name).write_text("\n".join(part) + "\n")
    quick["data"]["eval"] = [{"path": str(tmp_path / name)} for name in ("few.jsonl", "many.jsonl")]
    folder = train(quick).folder
    values = [entry["eval"] for entry in read_log(folder) if "eval" in entry][-1]
    sources = values["sources"]
    assert list(sources) == ["few.jsonl", "many.jsonl"]
    tokens = [source["supervised_tokens"] for source in sources.values()]
    assert values["supervised_tokens"] == sum(tokens)
    for name in ("loss", "token_accuracy"):
        mean = sum(source[name] * n for source, n in zip(sources.values(), tokens, strict=True)) / sum(tokens)
        assert values[name] == pytest.approx(mean)
    # what is evaluated on is not trained on
    data = json.loads((folder / "data.json").read_text())
    assert [source["samples"] for source in data["sources"]] == [
        {"train": 15, "eval": 0},
        {"train": 0, "eval": 2},
        {"train": 0, "eval": 7},
    ]


def test_watching_does_not_change_what_is_learnt(quick: dict[str, Any], tmp_path: Path) -> None:
    plain = train(quick | {"output": str(tmp_path / "plain")}).folder
    quick["samples"] = {"prompts": ["3 and 7?", "Who?"], "every_steps": 2, "max_new_tokens": 3}
    quick["train"] |= {"log_every_steps": 5, "save_every_steps": 4}
    watched = train(quick).folder
    weights = "checkpoint-12/adapter_model.safetensors"
    assert (plain / weights).read_bytes() == (watched / weights).read_bytes()


def test_memory_is_in_bytes() -> None:
    # a process with torch in it takes more than 50 MB and, in tests, less than 50 GB
    assert 5e7 < loop.peak_memory(torch.device("cpu")) < 5e10
