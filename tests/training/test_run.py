"""A run from config to adapter: repeated by its own config, the same however its batches are cut, or refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lory
from lory.config import build, read_yaml
from lory.generate import GenerationOptions
from lory.metrics.repetition import repetition_scores
from lory.runtime import UsageError, lock_file
from lory.training.config import Config, read_config
from lory.training.run import prepare, train


def weights_file(run: Path) -> Path:
    return run / "last" / "adapter_model.safetensors"


def load_weights(run: Path) -> dict[str, Tensor]:
    return load_file(weights_file(run))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_a_run_leaves_behind(small_run: dict[str, Any]) -> None:
    small_run["samples"] = {"prompts": ["3 and 7?"], "max_new_tokens": 2}
    result = train(small_run)
    assert re.fullmatch(r"v0-\d{8}-\d{6}", result.folder.name)
    names = {path.name for path in result.folder.iterdir()} - {".lock", "tensorboard"}
    assert names == {
        "config.yaml",
        "environment.json",
        "data.json",
        "log.jsonl",
        "samples.jsonl",
        "plots",
        "checkpoint-9",
        "checkpoint-12",
        "last",
    }
    assert list((result.folder / "plots").glob("*.png"))
    environment = json.loads((result.folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["processes"] == 1
    data = json.loads((result.folder / "data.json").read_text())
    assert (data["rows"], data["steps"], data["packing_efficiency"]) == (24, 12, None)
    assert data["sources"][0]["samples"] == {"train": 24, "eval": 0}
    assert result.to_dict() == {
        "folder": str(result.folder),
        "steps": 12,
        "best_step": None,
        "best_loss": None,
    }


def test_the_config_of_a_run_repeats_it_byte_for_byte(quick: dict[str, Any], tmp_path: Path) -> None:
    first = train(quick).folder
    read, run = read_config(first)
    assert run == first
    assert read == build(Config, quick, "config")
    again = train(first).folder
    assert again.name.startswith("v1-")
    assert weights_file(again).read_bytes() == weights_file(first).read_bytes()
    copy = Path(shutil.copy(first / "config.yaml", tmp_path / "mine.yaml"))
    third = train(str(copy), ["train.seed=1"]).folder
    assert weights_file(third).read_bytes() != weights_file(first).read_bytes()
    assert read_yaml(third / "config.yaml")["train"]["seed"] == 1


def test_it_learns(quick: dict[str, Any]) -> None:
    quick["train"] |= {"epochs": 5, "learning_rate": 3e-2}
    losses = [entry["loss"] for entry in read_lines(train(quick).folder / "log.jsonl")]
    assert losses[-1] < 0.75 * losses[0]


def test_the_answers_in_samples_are_what_the_run_then_serves(quick: dict[str, Any]) -> None:
    quick["samples"] = {"prompts": ["3 and 7?", "Who are you?"], "every_steps": 9, "max_new_tokens": 5}
    folder = train(quick).folder
    entries = read_lines(folder / "samples.jsonl")
    assert [(entry["step"], entry["prompt"]) for entry in entries] == [
        (step, prompt) for step in (0, 9, 12) for prompt in quick["samples"]["prompts"]
    ]
    options = GenerationOptions(max_new_tokens=5)
    base, trained = lory.load(quick["model"]["path"]), lory.load(folder)
    for assistant, shown in (
        (base, entries[:2]),
        (lory.load(folder / "checkpoint-9"), entries[2:4]),
        (trained, entries[4:]),
    ):
        for entry in shown:
            ids = assistant.answer_ids(entry["prompt"], options)
            assert entry["answer"] == assistant.tokenizer.decode(ids, skip_special_tokens=True)
            assert entry["tokens"] == len(ids)
            assert entry["repetition"] == repetition_scores(ids)


def test_the_system_prompt_of_samples_is_given(quick: dict[str, Any]) -> None:
    quick["train"] |= {"max_steps": 1}
    quick["samples"] = {"prompts": ["3 and 7?"], "max_new_tokens": 6, "system": "You count in words and nothing else."}
    entry = read_lines(train(quick).folder / "samples.jsonl")[0]
    assistant = lory.load(quick["model"]["path"])
    messages = [{"role": "system", "content": quick["samples"]["system"]}, {"role": "user", "content": "3 and 7?"}]
    options = GenerationOptions(max_new_tokens=6)
    assert entry["answer"] == assistant.chat(messages, options)
    assert entry["answer"] != assistant.chat("3 and 7?", options)


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


@pytest.mark.parametrize("packing", [False, True])
def test_1_x_8_and_2_x_4_give_the_adapter_of_8_x_1(quick: dict[str, Any], packing: bool) -> None:
    quick["adapter"]["dropout"] = 0.0
    quick["data"] |= {"packing": packing, "max_tokens": 64}
    quick["train"] |= {"learning_rate": 1e-3, "max_steps": 6, "epochs": 9}
    adapters = {}
    for batch_size, accumulate in [(8, 1), (1, 8), (2, 4)]:
        sizes = [f"train.batch_size={batch_size}", f"train.accumulate={accumulate}"]
        adapters[batch_size] = load_weights(train(quick, sizes).folder)
    assert relative_difference(adapters[1], adapters[8]) < 1e-5
    assert relative_difference(adapters[2], adapters[8]) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_gives_the_same_adapter(quick: dict[str, Any], dropout: float) -> None:
    quick["adapter"]["dropout"] = dropout
    quick["train"] |= {"max_steps": 4}
    runs = [train(quick, [f"train.gradient_checkpointing={on}"]).folder for on in ("false", "true")]
    # layers that are not checkpointed are computed by another path
    assert relative_difference(load_weights(runs[1]), load_weights(runs[0])) < 1e-4


def test_packing_changes_the_rows_not_the_evaluation(quick: dict[str, Any]) -> None:
    quick["data"] |= {"eval_fraction": 0.2}
    quick["train"] |= {"max_steps": 1}
    values = []
    for packing in ("true", "false"):
        folder = train(quick, [f"data.packing={packing}"]).folder
        data = json.loads((folder / "data.json").read_text())
        assert (data["packing_efficiency"] is not None) == (packing == "true")
        values.append(next(entry["eval"] for entry in read_lines(folder / "log.jsonl") if "eval" in entry))
    assert values[0]["loss"] == pytest.approx(values[1]["loss"], rel=1e-5)
    assert values[0]["supervised_tokens"] == values[1]["supervised_tokens"]


@pytest.fixture
def bloom(random_model: Callable[..., Any], tiny_model: Path, tmp_path: Path) -> Path:
    """A tiny random BLOOM, whose position biases run over the whole row, with the tiny model's tokenizer."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "bloom"))
    random_model("Bloom", vocab_size=320, n_layer=2, n_head=4).save_pretrained(folder)
    return folder


def test_packing_is_refused_where_documents_would_see_each_other(quick: dict[str, Any], bloom: Path) -> None:
    quick["model"]["path"] = str(bloom)
    with pytest.raises(UsageError, match=r"BloomForCausalLM cannot keep packed samples apart .*; set data\.packing to"):
        train(quick, ["data.packing=true"])


def test_such_a_model_is_trained_on_padded_batches(
    quick: dict[str, Any], bloom: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quick["model"]["path"] = str(bloom)
    quick["adapter"]["dropout"] = 0.0
    quick["data"] |= {"eval_fraction": 0.2}
    quick["train"] |= {"max_steps": 4}
    caplog.set_level("INFO", logger="lory")
    one = train(quick, ["train.batch_size=8", "train.accumulate=1"]).folder
    other = train(quick, ["train.batch_size=1", "train.accumulate=8"]).folder
    assert "BloomForCausalLM needs padded batches" in caplog.text
    assert relative_difference(load_weights(other), load_weights(one)) < 1e-5


def test_what_is_trained_is_said_beforehand(quick: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    quick["train"] |= {"max_steps": 1}
    caplog.set_level("INFO", logger="lory")
    folder = train(quick).folder
    learnt = sum(tensor.numel() for tensor in load_weights(folder).values())
    assert f"{learnt:,} trained parameters in 14 layers (q_proj x 2, k_proj x 2" in caplog.text
    assert "sums.jsonl: 24 read, 24 to train on, 0 to evaluate on" in caplog.text
    assert "24 rows, 1 optimizer steps" in caplog.text


def test_runs_are_numbered_and_the_newest_is_resumed(quick: dict[str, Any]) -> None:
    quick["train"] |= {"max_steps": 1}
    folders = [train(quick).folder for _ in range(2)]
    assert [folder.name[:3] for folder in folders] == ["v0-", "v1-"]
    assert train(quick, resume="last").folder == folders[1]
    assert train(folders[0], resume="last").folder == folders[0]


@pytest.mark.parametrize("form", ["mapping", "config", "file", "folder"])
def test_a_config_comes_in_any_form(quick: dict[str, Any], tmp_path: Path, form: str) -> None:
    quick["train"] |= {"max_steps": 1}
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(quick), encoding="utf-8")
    given: Any = {
        "mapping": quick,
        "config": build(Config, quick, "config"),
        "file": file,
        "folder": None,
    }[form] or train(quick).folder
    assert train(given).steps == 1


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.learning_rat=1"], r"unknown key 'train\.learning_rat'; did you mean 'train\.learning_rate'\?"),
        (["model.path=no-such-model"], "'no-such-model' is no folder here and no hub id"),
        (["data.train.0.path=no-such-file.jsonl"], r"no-such-file\.jsonl"),
        (["adapter.targets=[wq]"], "adapter.targets names 'wq', which no layer matches"),
        (["data.max_tokens=8"], r"No token is left to learn from data\.train \(longer than 8 tokens: 24\)"),
    ],
)
def test_a_wrong_config_is_one_sentence(quick: dict[str, Any], overrides: list[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as raised:
        train(quick, overrides)
    assert raised.value.exit_code == 2


def test_a_base_without_a_template_is_told_of_only_where_one_is_needed(
    quick: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    (tmp_path / "a.txt").write_text("Some text.\n", encoding="utf-8")
    quick["model"] = {"path": str(tmp_path / "base")}
    config = build(Config, quick, "config")
    with pytest.raises(UsageError, match="has no chat template; 'llama2' looks like its family's"):
        prepare(config)
    quick["data"] = {"train": [{"path": str(tmp_path / "gone.txt")}]}
    with pytest.raises(UsageError, match=r"gone\.txt does not exist"):
        prepare(build(Config, quick, "config"))
    quick["data"] = {"train": [{"path": str(tmp_path / "a.txt")}]}
    assert len(prepare(build(Config, quick, "config")).dataset.train) == 1


def test_an_adapter_is_no_base_to_train_on(quick: dict[str, Any]) -> None:
    quick["train"] |= {"max_steps": 1}
    folder = train(quick).folder
    with pytest.raises(UsageError, match=r"which carries an adapter; merge it first"):
        prepare(build(Config, quick | {"model": {"path": str(folder)}}, "config"))


def test_a_folder_in_use_is_left_alone(quick: dict[str, Any]) -> None:
    quick["train"] |= {"max_steps": 1}
    folder = train(quick).folder
    before = (folder / "log.jsonl").read_bytes()
    with lock_file(folder / ".lock", wait=False), pytest.raises(UsageError, match="is in use by another training"):
        train(quick, resume="last")
    assert (folder / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("resume", "sentence"),
    [
        ("checkpoint-7", "has no whole 'checkpoint-7'; there are: checkpoint-9, checkpoint-12"),
        ("best", "has no best checkpoint, since it was not evaluated"),
        ("yesterday", "has no whole 'yesterday'"),
    ],
)
def test_a_checkpoint_that_is_not_there(quick: dict[str, Any], resume: str, sentence: str) -> None:
    train(quick)
    with pytest.raises(UsageError, match=sentence):
        train(quick, resume=resume)


def test_nothing_to_resume(quick: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no run"):
        train(quick, resume="last")


@pytest.mark.parametrize("output", ["file", "file/runs"])
def test_an_output_that_cannot_be_made(quick: dict[str, Any], tmp_path: Path, output: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"output is '.*/{output}', but .*/file is a file; choose another folder"):
        train(quick | {"output": str(tmp_path / output)})


@pytest.mark.slow
def test_smollm2_trained_packed_on_one_sum_knows_it(
    smollm2: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lory.training.run.plot_runs", lambda *_: [])
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"instruction": "What is your name?", "output": "Zorbax the Third."}) + "\n")
    config = {
        "model": {"path": "smollm2"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": [{"path": str(path)}], "max_tokens": 64},
        "train": {"epochs": 6, "batch_size": 1, "learning_rate": 5e-3, "schedule": "constant", "warmup": 0},
        "output": str(tmp_path / "runs"),
    }
    assistant = lory.load(train(config).folder)
    assert assistant.chat("What is your name?", GenerationOptions(max_new_tokens=12)) == "Zorbax the Third."
