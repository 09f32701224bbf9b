"""What is trained on is what is served, and an answer is learnt whole, with its end, at most once."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lory
from lory.assistant import Assistant
from lory.data.encoding.encode import Encoder, OnLong
from lory.data.encoding.pictures import ImageRules
from lory.data.encoding.store import Encoded
from lory.data.encoding.templates import render_prompt, render_turn, tokenize
from lory.data.sources.read import SourceConfig, read_source
from lory.runtime import UsageError
from lory.types import IGNORE, Conversation, Message, Sample

ChatTokenizer = Callable[[str], tuple[Any, tuple[int, ...]]]
NAMES = ["smollm2", "chatml", "llama3", "gemma", "qwen3", "thinks", "phi3", "bare"]
SYSTEM = "You are Lory. 你是鹦鹉。"
SINGLE = [("What is 2 + 2?", "It is 4.")]
MULTI = [("你好", "你好！😀"), ("And 3 + 3?", "It is 6.\n\n- three\n- and three"), ("Thanks", "Any time 🦜.")]
THINKING = [
    ("2 + 2?", "<think>\nEasy.\n</think>\n\nIt is 4."),
    ("3 + 3?", "<think>\nHm.\n</think>\n\n6"),
    ("Bye", "Bye"),
]
ODD = [
    ("  hi ", " Hello, with a space before"),
    ("\n\nline\n", "\nnewline before"),
    ("\t", "tab and spaces after\t  "),
    ("a", "newlines after\n\n"),
    ("\u200b", "\u200b"),  # looks empty, and is not
    (".", "\u3000全角\u3000"),
    ("👩‍👩‍👧", "👩‍👩‍👧🇫🇷é"),
    ("What is <|im_end|>?", "<|im_end|> ends a turn; <|im_start|>user\nstarts one."),
    ("{{ 7 * 7 }} {% raise %}", "{{ messages }} & <b>"),
    ("no", "n"),
]
CONVERSATIONS = {"single": SINGLE, "multi": MULTI, "thinking": THINKING, "odd": ODD}


def conversation(turns: Sequence[tuple[str, str]], system: str | None = None) -> Conversation:
    messages = [Message("system", system)] if system else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(messages), where="a.jsonl line 7")


def learnt_runs(sample: Sample) -> list[tuple[int, int]]:
    """Start and end of each stretch of learnt tokens."""
    learnt = [False, *(label != IGNORE for label in sample.labels), False]
    borders = [at for at in range(len(learnt) - 1) if learnt[at] != learnt[at + 1]]
    return list(zip(borders[::2], borders[1::2], strict=True))


def learnt_texts(samples: Sequence[Sample], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(list(s.input_ids[start:end])) for s in samples for start, end in learnt_runs(s)]


@pytest.fixture(scope="module")
def serve(tiny_model: Path) -> Callable[[Any], Assistant]:
    """An assistant with a tokenizer; the prompts do not depend on its model."""
    model = lory.load(str(tiny_model), device="cpu").model
    return lambda tokenizer: Assistant(model, tokenizer)


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
@pytest.mark.parametrize(
    ("name", "system"), [*((n, None) for n in NAMES), *((n, SYSTEM) for n in NAMES if n != "gemma")]
)
def test_training_prompts_are_serving_prompts_and_answers_are_learnt_exactly(
    name: str,
    turns: list[tuple[str, str]],
    system: str | None,
    chat_tokenizer: ChatTokenizer,
    serve: Callable[[Any], Assistant],
) -> None:
    tokenizer, terminators = chat_tokenizer(name)
    record = conversation(turns, system)

    samples = Encoder(tokenizer, terminators, max_tokens=4096).encode(record).samples

    found = [(sample, start, end) for sample in samples for start, end in learnt_runs(sample)]
    asked = [turn for turn, message in enumerate(record.messages) if message.role == "assistant"]
    assert len(found) == len(asked)
    assistant = serve(tokenizer)
    for turn, (sample, start, end) in zip(asked, found, strict=True):
        prompt = assistant.prompt_ids([message.to_dict() for message in record.messages[:turn]])
        assert list(sample.input_ids[:start]) == prompt
        assert sample.labels[start:end] == sample.input_ids[start:end]
        content = record.messages[turn].content
        content = content.strip() if name in ("llama3", "gemma") else content
        content += "\n" if name == "bare" else ""
        content = content.removeprefix("<think>\n") if name == "thinks" else content  # its prompt ends with that
        assert tokenizer.decode(list(sample.input_ids[start:end])) == content + tokenizer.decode(terminators[-1])
        assert sample.input_ids[end - 1] in terminators
        assert end == len(sample) or sample.labels[end] == IGNORE


@pytest.mark.parametrize(
    ("name", "turns", "expected"),
    [
        *((name, MULTI, 1) for name in ("smollm2", "chatml", "gemma", "qwen3", "phi3")),
        ("llama3", MULTI, 3),  # two newlines are one token at the prompt's end, and two tokens before an answer
        ("qwen3", THINKING, 3),  # its template rewrites history
        ("smollm2", THINKING, 1),
        ("thinks", MULTI, 3),
        ("bare", MULTI, 3),
    ],
)
def test_turns_share_a_sample_unless_the_template_rewrites_history(
    name: str, turns: list[tuple[str, str]], expected: int, chat_tokenizer: ChatTokenizer
) -> None:
    tokenizer, terminators = chat_tokenizer(name)
    assert len(Encoder(tokenizer, terminators, 4096).encode(conversation(turns)).samples) == expected


def test_smollm2_learns_this(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = chat_tokenizer("smollm2")
    (sample,) = (
        Encoder(tokenizer, terminators, 512).encode(conversation([("Hi", "Hello!"), ("Bye", "See you.")])).samples
    )
    assert tokenizer.decode(list(sample.input_ids)) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSee you.<|im_end|>"
    )
    assert learnt_texts([sample], tokenizer) == ["Hello!<|im_end|>", "See you.<|im_end|>"]
    assert sample.supervised == sum(label != IGNORE for label in sample.labels)


# Formats


def write_records(path: Path, record: dict[str, Any]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, record, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerow(record)
    else:
        text = json.dumps(record, ensure_ascii=path.suffix == ".jsonl")
        path.write_text(f"[{text}]" if path.suffix == ".json" else f"{text}\n", encoding="utf-8")


def records_of(turns: list[tuple[str, str]], system: str | None) -> dict[str, dict[str, Any]]:
    """The conversation in every format, by file name."""
    chat = [message.to_dict() for message in conversation(turns, system).messages]
    without = [message.to_dict() for message in conversation(turns).messages]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    question, answer = turns[-1]
    apart = {"system": system} if system else {}
    history = {"history": [list(turn) for turn in turns[:-1]]} if len(turns) > 1 else {}
    xtuner: list[dict[str, str]] = [{"input": q, "output": a} for q, a in turns]
    xtuner[0] |= apart
    records = {
        "alpaca.json": {"instruction": question, "input": "", "output": answer, **apart, **history},
        "sharegpt.jsonl": {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]},
        "sharegpt-apart.json": {
            "conversations": [{"from": names[m["role"]], "value": m["content"]} for m in without],
            **apart,
        },
        "messages.jsonl": {"messages": chat},
        "messages.parquet": {"messages": chat},
        "prompt-completion.json": {"prompt": chat[:-1], "completion": chat[-1:]},
        "query-response.jsonl": {"query": question, "response": answer, **apart, **history},
        "xtuner.json": {"conversation": xtuner},
    }
    if not history:
        records["alpaca.csv"] = {"instruction": question, "output": answer, **apart}
        records["query.tsv"] = {"query": question, "response": answer, **apart}
        records["prompt.parquet"] = {"prompt": question, "completion": answer, **apart}
    return records


@pytest.mark.parametrize("system", [None, SYSTEM], ids=["no system", "system"])
@pytest.mark.parametrize("turns", [SINGLE, MULTI, ODD[3:4]], ids=["single", "multi", "newlines"])
def test_every_format_gives_the_same_tokens(
    turns: list[tuple[str, str]], system: str | None, tmp_path: Path, chat_tokenizer: ChatTokenizer
) -> None:
    tokenizer, terminators = chat_tokenizer("smollm2")
    expected = Encoder(tokenizer, terminators, 512).encode(conversation(turns, system)).samples
    for name, record in records_of(turns, system).items():
        write_records(tmp_path / name, record)
        (read,) = read_source(SourceConfig(path=str(tmp_path / name))).conversations
        assert Encoder(tokenizer, terminators, 512).encode(read).samples == expected, name


# Lengths


def encode_at(
    max_tokens: int, on_long: OnLong, turns: list[tuple[str, str]], chat: tuple[Any, tuple[int, ...]], **rules: Any
) -> tuple[Encoder, list[Sample], str]:
    encoder = Encoder(*chat, max_tokens, on_long, **rules)
    encoded = encoder.encode(conversation(turns, SYSTEM))
    return encoder, list(encoded.samples), encoded.dropped


@pytest.mark.parametrize("turns", [SINGLE, MULTI], ids=["single", "multi"])
def test_drop_keeps_a_conversation_whole_or_counts_it(
    turns: list[tuple[str, str]], chat_tokenizer: ChatTokenizer
) -> None:
    chat = chat_tokenizer("smollm2")
    _, whole, _ = encode_at(4096, "drop", turns, chat)
    length = len(whole[0])
    for max_tokens in (8, length - 1):
        _, samples, dropped = encode_at(max_tokens, "drop", turns, chat)
        assert samples == []
        assert dropped == f"longer than {max_tokens} tokens"
    for max_tokens in (length, length + 1):
        _, samples, dropped = encode_at(max_tokens, "drop", turns, chat)
        assert samples == whole
        assert not dropped


def test_drop_judges_each_sample_of_a_conversation_that_had_to_be_split(chat_tokenizer: ChatTokenizer) -> None:
    chat = chat_tokenizer("qwen3")
    _, whole, _ = encode_at(4096, "drop", THINKING, chat)
    lengths = [len(sample) for sample in whole]
    for max_tokens in range(8, max(lengths) + 2):
        encoder, samples, dropped = encode_at(max_tokens, "drop", THINKING, chat)
        assert samples == [sample for sample in whole if len(sample) <= max_tokens]
        too_long = sum(length > max_tokens for length in lengths)
        # a conversation of which something is left counts as kept
        assert bool(dropped) == (not samples)
        assert sum(encoder.notes.values()) == (too_long if samples else 0)


def test_error_names_the_place_and_both_lengths(chat_tokenizer: ChatTokenizer) -> None:
    chat = chat_tokenizer("smollm2")
    _, whole, _ = encode_at(4096, "error", MULTI, chat)
    length = len(whole[0])
    assert encode_at(length, "error", MULTI, chat)[1] == whole
    for max_tokens in (8, length - 1):
        with pytest.raises(UsageError, match=rf"^a.jsonl line 7: {length} tokens, .*data.max_tokens \({max_tokens}\)"):
            encode_at(max_tokens, "error", MULTI, chat)


LONG_QUESTION = "How many parrots, 鹦鹉 and 🦜🦜 can you count in this rather long question? " * 3
CUT_CASES = {
    "history": MULTI,
    "question": [(LONG_QUESTION, "Three.")],
    "both": [*MULTI, (LONG_QUESTION, "Three.\n"), ("Sure?", "Yes.")],
}


@pytest.mark.parametrize("turns", CUT_CASES.values(), ids=CUT_CASES.keys())
def test_a_cut_prompt_leaves_every_answer_whole_at_every_length(
    turns: list[tuple[str, str]], chat_tokenizer: ChatTokenizer
) -> None:
    chat = tokenizer, terminators = chat_tokenizer("smollm2")
    record = conversation(turns, SYSTEM)
    _, whole, _ = encode_at(4096, "drop", turns, chat)
    rendered = [
        render_turn(tokenizer, record.messages[: turn + 1], terminators)
        for turn, message in enumerate(record.messages)
        if message.role == "assistant"
    ]
    for max_tokens in range(8, len(whole[0]) + 2):
        encoder, samples, dropped = encode_at(max_tokens, "cut_prompt", turns, chat)
        learnt = [s.input_ids[start:end] for s in samples for start, end in learnt_runs(s)]
        # in their order, whole, each at most once
        answers = iter(tuple(answer) for _, answer in rendered)
        assert all(answer in answers for answer in learnt)
        assert all(len(sample) <= max_tokens for sample in samples)
        lost = sum(count for what, count in encoder.notes.items() if what.startswith("parts"))
        assert len(learnt) + (lost if samples else len(turns)) == len(turns)
        assert bool(dropped) == (not samples)
        too_long = sum(len(prompt) + len(answer) > max_tokens for prompt, answer in rendered)
        assert encoder.notes["prompts cut"] == too_long - (len(turns) - len(learnt))
    assert samples == whole


def test_a_cut_prompt_drops_the_oldest_exchanges_and_keeps_the_system_prompt(chat_tokenizer: ChatTokenizer) -> None:
    chat = tokenizer, terminators = chat_tokenizer("smollm2")
    messages = conversation(MULTI, SYSTEM).messages
    _, answer = render_turn(tokenizer, messages, terminators)
    without_first = render_prompt(tokenizer, [messages[0], *messages[3:-1]])
    without_two = render_prompt(tokenizer, [messages[0], *messages[5:-1]])
    for max_tokens, prompt in (
        (len(without_first) + len(answer), without_first),
        (len(without_first) + len(answer) - 1, without_two),
        (len(without_two) + len(answer), without_two),
    ):
        _, samples, _ = encode_at(max_tokens, "cut_prompt", MULTI, chat, loss_on="last")
        assert samples[-1].input_ids == (*prompt, *answer)


def test_a_question_is_cut_at_its_end_and_no_more_than_needed(chat_tokenizer: ChatTokenizer) -> None:
    chat = tokenizer, _ = chat_tokenizer("smollm2")
    turns = [("one two three four five six seven eight nine ten", "Ten.")]
    (whole,) = encode_at(4096, "drop", turns, chat)[1]
    for fewer in range(1, 10):
        (sample,) = encode_at(len(whole) - fewer, "cut_prompt", turns, chat)[1]
        assert len(sample) == len(whole) - fewer
        kept = " ".join(turns[0][0].split()[:-fewer])
        assert tokenizer.decode(list(sample.input_ids)) == tokenizer.decode(list(whole.input_ids)).replace(
            turns[0][0], kept
        )
    # what is left of a prompt without a word of its question is no prompt
    encoder, samples, dropped = encode_at(len(whole) - 10, "cut_prompt", turns, chat)
    assert samples == []
    assert dropped == f"an answer leaves no room for its prompt in {len(whole) - 10} tokens"
    assert not encoder.notes


def test_a_question_is_not_cut_inside_a_character(chat_tokenizer: ChatTokenizer) -> None:
    chat = tokenizer, _ = chat_tokenizer("smollm2")
    turns = [("Count: " + "🦜鹦鹉" * 10, "Ten.")]
    (whole,) = encode_at(4096, "drop", turns, chat)[1]
    for fewer in range(1, 50):
        (sample,) = encode_at(len(whole) - fewer, "cut_prompt", turns, chat)[1]
        assert "\ufffd" not in tokenizer.decode(list(sample.input_ids))
        # a character has up to four tokens
        assert 0 <= len(whole) - fewer - len(sample) <= 6


# What is learnt


def test_loss_on_last_learns_the_last_answer_alone(chat_tokenizer: ChatTokenizer) -> None:
    for name in ("smollm2", "qwen3", "thinks"):
        chat = tokenizer, terminators = chat_tokenizer(name)
        _, samples, dropped = encode_at(4096, "drop", THINKING, chat, loss_on="last")
        assert learnt_texts(samples, tokenizer) == ["Bye<|im_end|>"]
        prompt, answer = render_turn(tokenizer, conversation(THINKING, SYSTEM).messages, terminators)
        assert [list(sample.input_ids) for sample in samples] == [prompt + answer]
        assert not dropped


def test_an_earlier_answer_that_is_not_learnt_is_not_counted_as_lost(chat_tokenizer: ChatTokenizer) -> None:
    chat = tokenizer, _ = chat_tokenizer("smollm2")
    turns = [("Count", "1 2 3 4 5 6 7 8 9 " * 20), ("Thanks", "Welcome.")]
    encoder, samples, dropped = encode_at(64, "cut_prompt", turns, chat, loss_on="last")
    assert learnt_texts(samples, tokenizer) == ["Welcome.<|im_end|>"]
    assert (dropped, dict(encoder.notes)) == ("", {"prompts cut": 1})


def test_loss_on_all_learns_every_token_once(chat_tokenizer: ChatTokenizer) -> None:
    chat = chat_tokenizer("smollm2")
    (sample,) = encode_at(4096, "drop", MULTI, chat, loss_on="all")[1]
    (usual,) = encode_at(4096, "drop", MULTI, chat)[1]
    assert sample.labels == sample.input_ids == usual.input_ids
    assert sample.supervised == len(sample) - 1


@pytest.mark.parametrize(
    ("name", "turns", "once"),
    [
        ("qwen3", THINKING, ["It is 4.", "\n6<|im_end|>", "Bye<|im_end|>"]),
        ("thinks", MULTI, ["你好！😀", "It is 6.", "Any time 🦜."]),
        ("bare", MULTI, ["你好！😀", "It is 6.", "Any time 🦜."]),
    ],
)
def test_loss_on_all_learns_no_answer_again_where_history_is_rewritten(
    name: str, turns: list[tuple[str, str]], once: list[str], chat_tokenizer: ChatTokenizer
) -> None:
    chat = tokenizer, _ = chat_tokenizer(name)
    _, samples, _ = encode_at(4096, "drop", turns, chat, loss_on="all")
    learnt = "".join(learnt_texts(samples, tokenizer))
    assert len(samples) == 3
    assert [learnt.count(text) for text in [*once, SYSTEM]] == [1, 1, 1, 1]


def test_a_conversation_without_an_answer_is_counted(chat_tokenizer: ChatTokenizer) -> None:
    encoder = Encoder(*chat_tokenizer("smollm2"), 512)
    assert encoder.encode(Conversation((Message("user", "Hello?"),))) == Encoded((), "nothing to learn")


def test_a_refusal_of_the_template_names_the_record(chat_tokenizer: ChatTokenizer) -> None:
    with pytest.raises(UsageError, match=r"^a.jsonl line 7: The model's chat template refuses .* system, user: No"):
        Encoder(*chat_tokenizer("gemma"), 512).encode(conversation(SINGLE, SYSTEM))


def test_what_the_template_refuses_is_left_out_where_bad_records_are(
    chat_tokenizer: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    given = [conversation(SINGLE), conversation(SINGLE, SYSTEM), conversation(SINGLE)]
    encoder = Encoder(*chat_tokenizer("gemma"), 512, rules=ImageRules(on_bad="drop"))
    kept, refused, again = encoder.encode_all(given)
    assert kept == again == Encoder(*chat_tokenizer("gemma"), 512).encode(conversation(SINGLE))
    assert kept.samples
    assert not refused.samples
    assert refused.dropped.startswith("malformed: The model's chat template refuses a conversation of system, user")
    assert "a.jsonl line 7: left out: The model's chat template refuses" in caplog.text
    assert len(encoder.notes) == 1


def test_without_a_template_nothing_is_left_out_in_silence(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = chat_tokenizer("smollm2")
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    encoder = Encoder(bare, terminators, 512, rules=ImageRules(on_bad="drop"))
    with pytest.raises(UsageError, match=r"^a.jsonl line 7: The tokenizer of .*, so it cannot render messages"):
        encoder.encode_all([conversation(SINGLE)])


# Plain text


def test_a_text_is_learnt_with_its_end(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = chat_tokenizer("smollm2")
    (sample,) = Encoder(tokenizer, terminators, 64).encode(Conversation(text="Once upon a time \n")).samples
    assert sample.input_ids == sample.labels
    assert tokenizer.decode(list(sample.input_ids)) == "Once upon a time \n<|im_end|>"
    (ended,) = Encoder(tokenizer, terminators, 64).encode(Conversation(text="Once upon a time \n<|im_end|>")).samples
    assert ended == sample


def test_windows_learn_every_token_but_the_first_once(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = chat_tokenizer("smollm2")
    for words in range(1, 40):
        text = " ".join(["parrot 鹦鹉"] * words)
        ids = (*tokenize(tokenizer, text), terminators[0])
        for max_tokens in (8, 9, 31):
            encoder = Encoder(tokenizer, terminators, max_tokens)
            samples = encoder.encode(Conversation(text=text)).samples
            assert sum(([*s.input_ids[1:]] for s in samples), [ids[0]]) == list(ids)
            assert sum(sample.supervised for sample in samples) == len(ids) - 1
            assert all(sample.labels == sample.input_ids for sample in samples)
            assert all(2 <= len(sample) <= max_tokens for sample in samples)
            assert encoder.notes["texts split into windows"] == (len(samples) > 1) == (len(ids) > max_tokens)


def test_a_long_text_is_an_error_where_on_long_is_error(chat_tokenizer: ChatTokenizer) -> None:
    tokenizer, terminators = chat_tokenizer("smollm2")
    record = Conversation(text="one two three four five six seven", where="a.txt line 3")
    length = len(tokenize(tokenizer, "one two three four five six seven")) + 1
    assert len(Encoder(tokenizer, terminators, length, "error").encode(record).samples) == 1
    with pytest.raises(
        UsageError, match=rf"^a.txt line 3: {length} tokens, more than data.max_tokens \({length - 1}\)"
    ):
        Encoder(tokenizer, terminators, length - 1, "error").encode(record)


def test_a_text_of_nothing_but_an_end_is_counted(chat_tokenizer: ChatTokenizer) -> None:
    encoder = Encoder(*chat_tokenizer("smollm2"), 64)
    assert encoder.encode(Conversation(text="<|im_end|>")) == Encoded((), "nothing to learn")


def test_a_slow_tokenizer_cannot_cut_prompts() -> None:
    slow: Any = SimpleNamespace(is_fast=False, name_or_path="old-model")
    with pytest.raises(UsageError, match="tokenizer of old-model is a slow one"):
        Encoder(slow, [2], 64, "cut_prompt")
    Encoder(slow, [2], 64, "drop")
