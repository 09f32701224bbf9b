"""What MODEL can be, and one sentence for each thing it cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lory.models import embedded
from lory.models.resolve import find_checkpoint, find_run, list_checkpoints, list_runs, resolve
from lory.runtime import UsageError


def make_adapter(folder: Path, base: str | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA"} | ({"base_model_name_or_path": base} if base else {})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make_run(folder: Path, base: Path, steps: tuple[int, ...] = (3, 12, 6)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("{}")
    for step in steps:
        (make_adapter(folder / f"checkpoint-{step}", str(base)) / "MANIFEST.json").write_text("{}")
    return folder


def test_a_model_folder(tiny_model: Path) -> None:
    found = resolve(tiny_model)
    assert (found.base_path, found.adapter, found.base) == (tiny_model, None, str(tiny_model.resolve()))
    assert found.tokenizer_path == tiny_model


def test_a_relative_model_folder_is_named_absolutely(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the name is written into adapters, which are used from other working directories
    monkeypatch.chdir(tiny_model.parent)
    assert resolve(tiny_model.name).base == str(tiny_model.resolve())


def test_an_adapter_folder(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", str(tiny_model))
    found = resolve(adapter)
    assert (found.base_path, found.adapter, found.base) == (tiny_model, adapter, str(tiny_model))
    assert found.tokenizer_path == tiny_model
    (adapter / "tokenizer_config.json").write_text("{}")
    assert found.tokenizer_path == adapter


def test_a_checkpoint_a_run_and_the_folder_of_runs(tiny_model: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "v2-a", tiny_model, steps=(99,))
    newest = make_run(tmp_path / "v10-b", tiny_model)
    assert resolve(newest / "checkpoint-3").adapter == newest / "checkpoint-3"
    assert resolve(newest).adapter == newest / "checkpoint-12"
    assert resolve(tmp_path).adapter == newest / "checkpoint-12"


def test_the_embedded_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "prepare_smollm2", lambda: tmp_path)
    found = resolve("smollm2")
    assert (found.base, found.base_path, found.adapter) == ("smollm2", tmp_path, None)
    adapter = make_adapter(tmp_path / "adapter", "smollm2")
    assert (resolve(adapter).base, resolve(adapter).base_path) == ("smollm2", tmp_path)


def test_a_hub_id_out_of_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    found = resolve("owner/name")
    assert (found.base, found.base_path, found.adapter) == ("owner/name", snapshot, None)


@pytest.mark.parametrize("name", ["nobody/nothing", "no-body/no.thing_2"])
def test_a_hub_id_that_cannot_be_fetched(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is no folder here, and the hub could not be reached"):
        resolve(name)


@pytest.mark.parametrize("name", ["a--b/c", "a/b..c", "-a/b", "a/" + "b" * 200])
def test_a_name_the_hub_does_not_allow(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is no folder here"):
        resolve(name)


@pytest.mark.parametrize("name", ["nothing", "./runs/mine", "/no/such", "a/b/c", "~/no-such-folder", "", "two words/x"])
def test_neither_folder_nor_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name:
        with pytest.raises(UsageError, match=f"'{name}' is no folder here and no hub id"):
            resolve(name)
    else:
        with pytest.raises(UsageError):
            resolve(name)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UsageError, match=r"model\.gguf' is a file; a model is a folder"):
        resolve(tmp_path / "model.gguf")


def test_a_folder_with_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no adapter_config\.json, no config\.json and no run"):
        resolve(tmp_path)


def test_a_run_without_a_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "v0-x", tiny_model, steps=())
    with pytest.raises(UsageError, match="has no whole checkpoint yet"):
        resolve(run)


def test_an_adapter_that_names_no_base(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not name its base model"):
        resolve(make_adapter(tmp_path / "adapter", None))


def test_an_adapter_on_itself(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="names its own folder as the base model"):
        resolve(make_adapter(tmp_path / "adapter", str(tmp_path / "adapter")))


def test_an_adapter_on_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    first = make_adapter(tmp_path / "first", str(tiny_model))
    with pytest.raises(UsageError, match="which is an adapter itself; merge that one first"):
        resolve(make_adapter(tmp_path / "second", str(first)))


def test_adapters_in_a_circle(tmp_path: Path) -> None:
    make_adapter(tmp_path / "a", str(tmp_path / "b"))
    make_adapter(tmp_path / "b", str(tmp_path / "a"))
    with pytest.raises(UsageError, match="which is an adapter itself"):
        resolve(tmp_path / "a")


@pytest.mark.parametrize(("text", "sentence"), [("{", "is not valid JSON"), ("[]", "does not name its base model")])
def test_an_adapter_config_that_is_none(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        resolve(tmp_path)


def test_runs_are_ordered_by_number(tmp_path: Path, tiny_model: Path) -> None:
    for name in ("v10-a", "v9-b", "v2-c", "very-other", "v-x"):
        make_run(tmp_path / name, tiny_model)
    assert [run.name for run in list_runs(tmp_path)] == ["v2-c", "v9-b", "v10-a"]


def test_a_run_that_was_killed_before_it_was_described_is_no_run(tmp_path: Path, tiny_model: Path) -> None:
    run = make_run(tmp_path / "v0-a", tiny_model)
    (tmp_path / "v1-b").mkdir()
    assert find_run(tmp_path) == run
    assert find_run(run) == run


def test_a_checkpoint_without_a_manifest_is_none(tmp_path: Path, tiny_model: Path) -> None:
    run = make_run(tmp_path / "v0-a", tiny_model)
    (run / "checkpoint-12" / "MANIFEST.json").unlink()
    make_adapter(run / ".checkpoint-15.abc.tmp", str(tiny_model))
    assert [checkpoint.name for checkpoint in list_checkpoints(run)] == ["checkpoint-3", "checkpoint-6"]
    assert find_checkpoint(run).name == "checkpoint-6"


def test_checkpoints_by_name(tmp_path: Path, tiny_model: Path) -> None:
    run = make_run(tmp_path / "v0-a", tiny_model)
    assert find_checkpoint(run, "checkpoint-3") == run / "checkpoint-3"
    with pytest.raises(UsageError, match="has no best checkpoint, since it was not evaluated"):
        find_checkpoint(run, "best")
    os.symlink("checkpoint-6", run / "best")
    assert find_checkpoint(run, "best") == (run / "checkpoint-6").resolve()
    with pytest.raises(
        UsageError, match="no whole 'checkpoint-5'; there are: checkpoint-3, checkpoint-6, checkpoint-12"
    ):
        find_checkpoint(run, "checkpoint-5")
