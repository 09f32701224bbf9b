"""Adapters over one base: each answers as if it had been loaded alone, and the base is the base again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lory.adapters import prompt
from lory.adapters.encoders import PromptConfig
from lory.adapters.files import save_adapter
from lory.adapters.inject import AdapterConfig, adapted_layers, attach_lora
from lory.assistant import Assistant, load
from lory.chat.adapters import Adapters, open_chat
from lory.generate import GenerationOptions
from lory.models.lean import find_decoder
from lory.runtime import UsageError

OPTIONS = GenerationOptions(max_new_tokens=8)


def answers(assistant: Assistant) -> list[list[int]]:
    return [assistant.answer_ids(question, OPTIONS) for question in ("Who are you?", "Two and two?")]


@pytest.fixture
def make_adapter(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a random adapter on the tiny model that changes its answers: `make_adapter("name", rank=2)`."""

    def make(name: str, kind: str = "lora", **settings: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        torch.manual_seed(len(name))
        if kind in ("prompt", "prefix"):
            prompt.attach(model, PromptConfig(type=kind, virtual_tokens=3))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter)
            prompt.save(model, folder, str(tiny_model))
        else:
            attach_lora(model, AdapterConfig(type=kind, **{"rank": 2, "alpha": 8, **settings}))
            for _, layer in adapted_layers(model):
                torch.nn.init.normal_(layer.lora_B, std=0.3)
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.ndim == 1:
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
            save_adapter(model, folder, str(tiny_model))
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lora", {}),
        ("dora", {}),
        ("lora", {"modules_to_save": ["lm_head", "norm"]}),
        ("lora", {"targets": ["embed_tokens", "q_proj"]}),
        ("prompt", {}),
        ("prefix", {}),
    ],
    ids=["lora", "dora", "with modules of its own", "embedding", "prompt", "prefix"],
)
def test_an_adapter_answers_as_if_loaded_alone_and_leaves_no_trace(
    tiny_model: Path, tiny_adapter: Path, make_adapter: Callable[..., Path], kind: str, settings: dict[str, Any]
) -> None:
    folder = make_adapter("one", kind, **settings)
    plain, other, own = (answers(load(path)) for path in (tiny_model, tiny_adapter, folder))
    assert plain != own != other
    assistant, adapters = open_chat(tiny_model, {"one": str(folder), "two": str(tiny_adapter)})
    assert adapters is not None
    assert (adapters.names, adapters.current) == (["one", "two"], None)
    assert answers(assistant) == plain
    for name, expected in (("one", own), ("two", other), ("one", own), (None, plain)):
        assistant = adapters.use(name)
        assert adapters.current == name
        assert answers(assistant) == expected
    assert not list(adapted_layers(assistant.model))
    assert prompt.virtual_length(assistant.model) == 0


def test_a_model_that_is_an_adapter_begins_with_it_and_can_take_it_off(tiny_model: Path, tiny_adapter: Path) -> None:
    assistant, adapters = open_chat(tiny_adapter)
    assert adapters is not None
    assert assistant.name == adapters.current == str(tiny_adapter)
    assert answers(assistant) == answers(load(tiny_adapter))
    assert answers(adapters.use(None)) == answers(load(tiny_model))


def test_weights_are_shared(tiny_model: Path, tiny_adapter: Path) -> None:
    assistant, adapters = open_chat(tiny_model, {"one": str(tiny_adapter)})
    assert adapters is not None
    dressed = adapters.use("one").model
    assert dressed is not assistant.model
    own = {id(parameter) for parameter in assistant.model.parameters()}
    assert all("lora_" in name for name, parameter in dressed.named_parameters() if id(parameter) not in own)
    assert find_decoder(dressed) is not None
    assert find_decoder(adapters.use(None).model) is not None


def test_one_that_does_not_fit_leaves_the_one_before_on(
    tiny_model: Path, tiny_adapter: Path, make_adapter: Callable[..., Path]
) -> None:
    from safetensors.torch import load_file, save_file

    wrong = make_adapter("wrong")
    tensors = load_file(wrong / "adapter_model.safetensors")
    name = sorted(tensors)[-1]
    save_file({**tensors, name: torch.zeros(5, 5)}, wrong / "adapter_model.safetensors")
    _, adapters = open_chat(tiny_model, {"good": str(tiny_adapter), "wrong": str(wrong)})
    assert adapters is not None
    expected = answers(adapters.use("good"))
    with pytest.raises(UsageError, match="made for another model"):
        adapters.use("wrong")
    assert adapters.current == "good"
    assert answers(adapters.use("good")) == expected
    with pytest.raises(UsageError, match="'missing' is no adapter here; there are: good, wrong"):
        adapters.use("missing")


def test_what_is_no_adapter_is_refused(tiny_model: Path, tiny_adapter: Path, make_adapter: Callable[..., Path]) -> None:
    _, adapters = open_chat(tiny_model, {"good": str(tiny_adapter)})
    assert isinstance(adapters, Adapters)
    with pytest.raises(UsageError, match="is a whole model, not an adapter"):
        adapters.add("model", tiny_model)
    with pytest.raises(UsageError, match=r"'good' is the adapter in .* already"):
        adapters.add("good", make_adapter("one"))
    with pytest.raises(UsageError, match="int8 has one adapter"):
        open_chat(tiny_model, {"good": str(tiny_adapter)}, quantize="int8", device="cpu")


def test_int8_on_a_cpu_cannot_change_its_adapter(tiny_adapter: Path) -> None:
    assistant, adapters = open_chat(tiny_adapter, quantize="int8", device="cpu")
    assert adapters is None
    assert assistant.name == str(tiny_adapter)


def test_buffers_that_an_adapter_writes_into_are_its_own(tiny_model: Path, tiny_adapter: Path) -> None:
    assistant, adapters = open_chat(tiny_model, {"one": str(tiny_adapter)})
    assert adapters is not None
    before = {name: buffer.clone() for name, buffer in assistant.model.named_buffers()}
    assert before
    for buffer in adapters.use("one").model.buffers():
        buffer.zero_()
    adapters.use(None)
    assert all(torch.equal(before[name], buffer) for name, buffer in assistant.model.named_buffers())
