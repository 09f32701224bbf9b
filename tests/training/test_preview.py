"""A look before training: what is marked is what is learnt, and the memory is counted on what will be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lory.losses.cross_entropy import CHUNK_TOKENS
from lory.models.load import load_model
from lory.runtime import UsageError
from lory.training.config import Config
from lory.training.preview import describe_sample, estimate_memory, show_sample
from lory.training.run import Prepared, build_model, prepare
from lory.types import IGNORE, Sample


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def make_sample(tokenizer: Any, *parts: tuple[str, bool]) -> Sample:
    """A sample of texts, each learnt or not."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in parts:
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, labels = ids + new, labels + (new if learnt else [IGNORE] * len(new))
    return Sample(tuple(ids), tuple(labels))


@pytest.fixture
def prepared(tiny_model: Path, records: Path) -> Callable[..., Prepared]:
    """The tiny model on the 24 records, with other sections of the config as given."""

    def make(**sections: Any) -> Prepared:
        data = {"train": [{"path": str(records)}], "max_tokens": 96, **sections.pop("data", {})}
        values = {
            "model": {"path": str(tiny_model), "dtype": "float32"},
            "adapter": {"rank": 3},
            "data": data,
            **sections,
        }
        return prepare(Config.model_validate(values))

    return make


# Samples


def test_learnt_text_stands_between_brackets(tokenizer: Any) -> None:
    sample = make_sample(tokenizer, ("Two and two? ", False), ("It is four.", True), (" And?", False), ("五🦜", True))
    assert show_sample(sample, tokenizer).plain == "Two and two? ⟦It is four.⟧ And?⟦五🦜⟧"


def test_learnt_text_and_its_brackets_have_the_colour(tokenizer: Any) -> None:
    text = show_sample(make_sample(tokenizer, ("Two?", False), ("Yes [b]bold[/b].", True)), tokenizer)
    coloured = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert coloured == "⟦Yes [b]bold[/b].⟧"


def test_the_first_token_is_never_learnt(tokenizer: Any) -> None:
    sample = make_sample(tokenizer, ("Paris is", True))
    first = tokenizer.decode([sample.input_ids[0]])
    rest = tokenizer.decode(sample.input_ids[1:])
    assert show_sample(sample, tokenizer).plain == f"{first}⟦{rest}⟧"
    assert describe_sample(sample, tokenizer)["learnt_text"] == rest
    assert len(tokenizer(rest, add_special_tokens=False)["input_ids"]) == sample.supervised


def test_marks_are_shown(tokenizer: Any) -> None:
    sample = make_sample(tokenizer, ("<|im_start|>user\nHi", False), ("Ho<|im_end|>", True))
    assert show_sample(sample, tokenizer).plain == "<|im_start|>user\nHi⟦Ho<|im_end|>⟧"


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_what_is_marked_is_what_is_counted(prepared: Callable[..., Prepared], loss_on: str) -> None:
    made = prepared(data={"loss_on": loss_on})
    for sample in made.dataset.train[:5]:
        plain = show_sample(sample, made.tokenizer).plain
        marked = plain[plain.index("⟦") + 1 : plain.index("⟧")]
        assert marked == describe_sample(sample, made.tokenizer)["learnt_text"]
        assert len(made.tokenizer(marked, add_special_tokens=False)["input_ids"]) == sample.supervised


def test_a_described_sample_is_json_with_tokens_and_labels(tokenizer: Any) -> None:
    sample = make_sample(tokenizer, ("Two?", False), ("四", True))
    described = json.loads(json.dumps(describe_sample(sample, tokenizer)))
    assert described == {
        "input_ids": list(sample.input_ids),
        "labels": list(sample.labels),
        "text": "Two?四",
        "learnt_text": "四",
    }


# Memory


def test_weights_and_adapter_are_counted_exactly(prepared: Callable[..., Prepared]) -> None:
    made = prepared()
    memory = estimate_memory(made, made.plan().rows)
    base = load_model(made.resolved, "float32")
    assert memory["base_weights"] == sum(p.nbytes for p in base.parameters())
    # A and B of 7 linear layers in each of 2 layers, by hand: hidden 24, feed-forward 40, 4 heads and 2 of 6
    trained = 2 * 3 * (2 * (24 + 24) + 2 * (24 + 12) + 3 * (24 + 40))
    assert memory["adapter_and_optimizer"] == trained * 4 * 4
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")


def test_trained_parameters_are_those_of_the_real_model(prepared: Callable[..., Prepared]) -> None:
    from accelerate import Accelerator

    made = prepared(adapter={"rank": 5, "targets": ["q_proj", "down_proj"]})
    model, _ = build_model(made, Accelerator(cpu=True))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate_memory(made, made.plan().rows)["adapter_and_optimizer"] == trained * 16


def test_half_precision_halves_the_base_alone(prepared: Callable[..., Prepared], tiny_model: Path) -> None:
    full, half = (
        estimate_memory(made, made.plan().rows)
        for made in (prepared(model={"path": str(tiny_model), "dtype": dtype}) for dtype in ("float32", "bfloat16"))
    )
    assert full["base_weights"] == 2 * half["base_weights"]
    assert full["adapter_and_optimizer"] == half["adapter_and_optimizer"]
    assert full["logits"] == half["logits"] == CHUNK_TOKENS * 320 * 12


def test_activations_grow_with_the_longest_rows_of_a_batch(prepared: Callable[..., Prepared]) -> None:
    made = prepared(train={"batch_size": 3}, data={"packing": False})
    lengths = sorted((len(sample) for sample in made.dataset.train), reverse=True)
    activations = estimate_memory(made, made.plan().rows)["activations"]
    assert activations == sum(lengths[:3]) * 2 * (16 * 24 + 5 * 40) * 4
    assert estimate_memory(made, made.plan().rows[:1])["activations"] < activations


def test_gradient_checkpointing_takes_less(prepared: Callable[..., Prepared]) -> None:
    plain, less = prepared(), prepared(train={"gradient_checkpointing": True})
    rows = plain.plan().rows
    assert estimate_memory(less, rows)["activations"] < estimate_memory(plain, rows)["activations"]


def test_a_layer_that_is_not_there_is_refused(prepared: Callable[..., Prepared]) -> None:
    made = prepared(adapter={"targets": ["q_prj"]})
    with pytest.raises(UsageError, match=r"'q_prj', which no layer matches\. Did you mean 'q_proj'\?"):
        estimate_memory(made, made.plan().rows)


def test_a_model_of_another_kind_is_refused(
    prepared: Callable[..., Prepared], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "t5"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5", "architectures": ["T5Model"]}))
    made = prepared(model={"path": str(folder)})
    with pytest.raises(UsageError, match=r"t5 is no causal language model: .*T5Config"):
        estimate_memory(made, made.plan().rows)
