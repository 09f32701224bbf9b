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
from lory.training.preview import (
    describe_messages,
    describe_sample,
    estimate_memory,
    find_conversations,
    pick_samples,
    show_messages,
    show_sample,
    show_tokens,
    split_tokens,
)
from lory.training.run import Prepared, build_model, prepare
from lory.types import IGNORE, Conversation, Message, Sample, ToolCall


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
        data = {"train": [{"path": str(records)}], "max_tokens": 96, "cache": False, **sections.pop("data", {})}
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
        "tokens": split_tokens(sample.input_ids, tokenizer),
        "text": "Two?四",
        "learnt_text": "四",
    }


def test_a_weight_that_is_not_one_stands_behind_its_tokens(tokenizer: Any) -> None:
    plain = make_sample(tokenizer, ("Two? ", False), ("Four.", True), ("Or so.", True))
    answer = len(tokenizer("Four.", add_special_tokens=False)["input_ids"])
    start = len(tokenizer("Two? ", add_special_tokens=False)["input_ids"])
    weights = [0.0] * start + [0.5] * answer + [1.0] * (len(plain) - start - answer)
    sample = Sample(plain.input_ids, plain.labels, tuple(weights))
    assert show_sample(sample, tokenizer).plain == "Two? ⟦Four.⟧×0.5⟦Or so.⟧"
    assert show_tokens(sample, tokenizer).plain.replace("│", "") == "Two? ⟦Four.⟧×0.5⟦Or so.⟧"
    assert describe_sample(sample, tokenizer)["weights"] == weights


def test_tokens_are_told_apart(tokenizer: Any) -> None:
    sample = make_sample(tokenizer, ("Is it?\n", False), ("五 is", True))
    pieces = split_tokens(sample.input_ids, tokenizer)
    assert len(pieces) == len(sample)
    assert "".join(pieces) == "Is it?\n五 is"
    # a character of three bytes, which this tokenizer has no token for
    assert pieces[pieces.index("五") - 2 : pieces.index("五") + 1] == ["", "", "五"]
    shown = show_tokens(sample, tokenizer).plain
    assert shown.replace("│", "") == "Is it?↵⟦五 is⟧"
    assert shown.count("│") == len(sample) - 1


def test_samples_come_from_each_source_with_their_conversations(
    prepared: Callable[..., Prepared], records: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    # a duplicate has the sample of the first file
    other.write_text(records.read_text().splitlines()[0] + "\n")
    third = tmp_path / "third.jsonl"
    third.write_text('{"query": "Who?", "response": "Me."}\n{"query": "When?", "response": "Now."}\n')
    made = prepared(data={"train": [{"path": str(path)} for path in (records, other, third)]})
    indices = pick_samples(made.dataset, 2, each_source=True)
    found = find_conversations(made.dataset, made.config.data, indices)
    assert [conversation.where for conversation in found] == [
        f"{records} line 1",
        f"{records} line 2",
        f"{third} line 1",
        f"{third} line 2",
    ]
    for index, conversation in zip(indices, found, strict=True):
        answer = f"{conversation.messages[-1].content}<|im_end|>"
        assert describe_sample(made.dataset.train[index], made.tokenizer)["learnt_text"] == answer
    assert pick_samples(made.dataset, 2, each_source=False) == [0, 1]


def test_a_stream_s_conversations_are_found_by_their_places(prepared: Callable[..., Prepared], records: Path) -> None:
    train = [{"path": str(records)}, {"path": "identity", "name": "Lory", "author": "you"}]
    data = {"train": train, "streaming": True, "window_samples": 30, "mixing": "first_exhausted", "max_tokens": 400}
    made = prepared(data=data, train={"max_steps": 1})
    indices = list(range(20))
    found = find_conversations(made.dataset, made.config.data, indices)
    assert len({conversation.where.split()[0] for conversation in found}) == 2
    for index, conversation in zip(indices, found, strict=True):
        text = describe_sample(made.dataset.train[index], made.tokenizer)["text"]
        assert conversation.messages[-1].content in text


def test_messages_are_shown_whole_unless_they_shall_be_short() -> None:
    calls = (ToolCall("add", '{"a": 1}'),)
    messages = (
        Message("user", "long " * 100),
        Message("assistant", "Yes.", reasoning="Hm", tool_calls=calls, weight=2),
    )
    conversation = Conversation(messages)
    shown = f'user: {"long " * 100}\nassistant (weight 2): <think>Hm</think>\nYes.\ncalls add({{"a": 1}})'
    assert show_messages(conversation).plain == shown
    assert describe_messages(conversation)["messages"][0]["content"] == "long " * 100
    assert describe_messages(conversation)["messages"][1]["weight"] == 2
    for text in (
        show_messages(conversation, True).plain,
        describe_messages(conversation, True)["messages"][0]["content"],
    ):
        assert f"{('long ' * 100)[:199]}…" in text
    assert describe_messages(Conversation(text="Once"))["source_text"] == show_messages(Conversation(text="Once")).plain


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
