"""Evaluation is kept apart from training, and the report accounts for every record."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lory.config import build
from lory.data.mixture.dataset import DataConfig, Dataset, build_dataset
from lory.runtime import UsageError
from lory.types import IGNORE, Sample

Pair = tuple[str, str]
Make = Callable[..., Dataset]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def make(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Builds the data set of files in the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(train: Sequence[Any], seed: int = 0, **rules: Any) -> Dataset:
        sources = {key: [s if isinstance(s, dict) else {"path": s} for s in rules.pop(key, [])] for key in ("eval",)}
        sources["train"] = [source if isinstance(source, dict) else {"path": source} for source in train]
        return build_dataset(build(DataConfig, {**sources, **rules}, "test"), tokenizer, (2,), seed)

    return make


def write(path: str, pairs: Sequence[Pair]) -> None:
    lines = [json.dumps({"instruction": question, "output": answer}) for question, answer in pairs]
    Path(path).write_text("\n".join(lines), encoding="utf-8")


def numbered(first: int, last: int, answer: str = "It is {}.") -> list[Pair]:
    return [(f"What is {number}?", answer.format(number)) for number in range(first, last)]


def questions(samples: Sequence[Sample], tokenizer: Any) -> list[str]:
    """Everything before the last learnt answer."""
    return [
        tokenizer.decode([i for i, label in zip(s.input_ids, s.labels, strict=True) if label == IGNORE])
        for s in samples
    ]


def evaluated(dataset: Dataset) -> list[Sample]:
    return [sample for samples in dataset.eval.values() for sample in samples]


def assert_report_adds_up(dataset: Dataset) -> None:
    for source in dataset.report()["sources"]:
        assert source["read"] == source["kept"] + sum(source["dropped"].values())
        assert source["samples"]["train"] + source["samples"]["eval"] >= source["kept"]


# Splitting


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fraction", [0.07, 0.3, 0.8])
def test_a_question_is_either_trained_on_or_evaluated(fraction: float, seed: int, make: Make, tokenizer: Any) -> None:
    # the sources share questions, and ask some of their own several times
    write("a.jsonl", [*numbered(0, 60), *numbered(0, 20, "{}!"), *numbered(10, 15, "{}, of course.")])
    write("b.jsonl", [*numbered(30, 90), *numbered(30, 90)])
    dataset = make(["a.jsonl", "b.jsonl"], seed, eval_fraction=fraction)

    train, evaluation = set(questions(dataset.train, tokenizer)), set(questions(evaluated(dataset), tokenizer))

    assert not train & evaluation
    assert len(train | evaluation) == 90
    assert set(dataset.eval) == {"a.jsonl", "b.jsonl"}
    assert_report_adds_up(dataset)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.37, 0.9])
def test_the_fraction_is_respected_within_one_question(fraction: float, make: Make) -> None:
    write("a.jsonl", numbered(0, 101))
    for seed in range(5):
        dataset = make(["a.jsonl"], seed, eval_fraction=fraction)
        assert abs(len(evaluated(dataset)) - fraction * 101) <= 0.5
        assert len(dataset.train) + len(evaluated(dataset)) == 101


def test_a_question_asked_too_often_does_not_take_the_others_place(make: Make) -> None:
    write("a.jsonl", [*[("What is 0?", f"{n}") for n in range(60)], *numbered(1, 41)])
    for seed in range(20):
        assert len(evaluated(make(["a.jsonl"], seed, eval_fraction=0.1))) == 10


def test_the_split_depends_on_the_seed_and_the_questions_alone(make: Make, tokenizer: Any) -> None:
    pairs = numbered(0, 50)
    write("a.jsonl", pairs)
    write("turned.jsonl", [(question, answer.upper()) for question, answer in reversed(pairs)])

    def chosen(path: str, seed: int) -> set[str]:
        return set(questions(evaluated(make([path], seed, eval_fraction=0.2)), tokenizer))

    assert chosen("a.jsonl", 0) == chosen("a.jsonl", 0) == chosen("turned.jsonl", 0)
    assert chosen("a.jsonl", 0) != chosen("a.jsonl", 1)


def test_nothing_is_kept_for_evaluation_unless_asked_for(make: Make) -> None:
    write("a.jsonl", numbered(0, 20))
    dataset = make(["a.jsonl"])
    assert dataset.eval == {}
    assert len(dataset.train) == 20


def test_too_few_conversations_for_the_fraction_are_noted(make: Make) -> None:
    write("a.jsonl", numbered(0, 9))
    dataset = make(["a.jsonl"], eval_fraction=0.05)
    assert len(dataset.train) == 9
    assert dataset.report()["sources"][0]["notes"] == [
        "none is kept for evaluation: 0.05 of 9 is less than one question"
    ]


def test_questions_of_the_evaluation_sources_are_not_trained_on_and_counted(make: Make, tokenizer: Any) -> None:
    write("a.jsonl", [*numbered(0, 20), *numbered(15, 20, "{}!")])
    write("b.jsonl", numbered(18, 30))
    write("held.jsonl", numbered(16, 19, "Other words: {}"))
    dataset = make(["a.jsonl", "b.jsonl"], eval=["held.jsonl"])

    assert not set(questions(dataset.train, tokenizer)) & set(questions(evaluated(dataset), tokenizer))
    assert {name: len(samples) for name, samples in dataset.eval.items()} == {"held.jsonl": 3}
    dropped = {source["name"]: source["dropped"] for source in dataset.report()["sources"]}
    reason = "its question is in data.eval, too"
    assert dropped == {"a.jsonl": {reason: 6}, "b.jsonl": {reason: 1}, "held.jsonl": {}}
    assert_report_adds_up(dataset)


def test_the_last_question_with_its_history_is_what_tells_conversations_apart(make: Make) -> None:
    history = [["Hi", "Hello!"]]
    records = [{"instruction": "Who are you?", "output": "Lory.", "history": h} for h in ([], history)]
    Path("a.json").write_text(json.dumps(records))
    Path("held.json").write_text(json.dumps(records[1:]))
    dataset = make(["a.json"], eval=["held.json"])
    assert len(dataset.train) == 1


def test_plain_texts_are_split_too(make: Make, tokenizer: Any) -> None:
    Path("a.txt").write_text("\n".join(f"Text {number} of many." for number in [*range(20), *range(20)]))
    dataset = make(["a.txt"], eval_fraction=0.25)
    texts = [{tokenizer.decode(list(s.input_ids)) for s in samples} for samples in (dataset.train, evaluated(dataset))]
    assert [len(part) for part in texts] == [15, 5]
    assert not texts[0] & texts[1]


# Names, order and errors


def test_sources_of_one_name_are_numbered_and_evaluation_is_told_apart(make: Make) -> None:
    Path("sub").mkdir()
    write("a.jsonl", numbered(0, 5))
    write("sub/a.jsonl", numbered(5, 10))
    write("held.jsonl", numbered(10, 12))
    dataset = make(["a.jsonl", "sub/a.jsonl"], eval=["held.jsonl", "a.jsonl"])
    assert [source.name for source in dataset.sources] == ["a.jsonl", "a.jsonl-2", "held.jsonl", "a.jsonl (eval)"]
    assert {name: len(samples) for name, samples in dataset.eval.items()} == {"held.jsonl": 2, "a.jsonl (eval)": 5}
    assert_report_adds_up(dataset)


def test_samples_stand_in_the_order_of_sources_and_records(make: Make, tokenizer: Any) -> None:
    write("a.jsonl", numbered(5, 8))
    write("b.jsonl", numbered(0, 3))
    asked = [text.split("What is ")[1][0] for text in questions(make(["a.jsonl", "b.jsonl"]).train, tokenizer)]
    assert asked == ["5", "6", "7", "0", "1", "2"]


def test_nothing_left_to_learn_is_an_error_that_says_why(make: Make) -> None:
    write("a.jsonl", numbered(0, 3))
    with pytest.raises(UsageError) as caught:
        make(["a.jsonl"], max_tokens=8)
    assert str(caught.value) == "No token is left to learn from data.train (longer than 8 tokens: 3)."
    with pytest.raises(UsageError, match=r"\(its question is in data.eval, too: 3\)"):
        make(["a.jsonl"], eval=["a.jsonl"])
    write("one.jsonl", numbered(0, 1))
    with pytest.raises(UsageError, match=r"\(all of its conversations are kept for evaluation\)"):
        make(["one.jsonl"], eval_fraction=0.9)


def test_eval_and_eval_fraction_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="both eval and eval_fraction are given"):
        build(DataConfig, {"train": [{"path": "a"}], "eval": [{"path": "b"}], "eval_fraction": 0.1}, "test")


# The report


def test_the_report_counts_what_is_there(make: Make) -> None:
    long = ("Tell a story", "Once upon a time there was a parrot. " * 20)
    write("a.jsonl", [*numbered(0, 10), ("", "An answer."), ("A question", " "), long, *numbered(2, 3)])
    dataset = make(["a.jsonl"], eval_fraction=0.3, max_tokens=128)

    assert_report_adds_up(dataset)
    report = dataset.report()
    (source,) = report["sources"]
    samples = [*dataset.train, *evaluated(dataset)]
    lengths = [len(sample) for sample in samples]
    assert (source["name"], source["path"], source["read"], source["kept"]) == ("a.jsonl", "a.jsonl", 14, 11)
    assert source["dropped"] == {"empty question": 1, "empty answer": 1, "longer than 128 tokens": 1}
    assert source["samples"] == {"train": len(dataset.train), "eval": len(evaluated(dataset))}
    assert source["tokens"] == sum(lengths)
    assert source["supervised_tokens"] == sum(sample.supervised for sample in samples)
    assert source["lengths"]["min"] == min(lengths)
    assert source["lengths"]["median"] == statistics.median(lengths)
    assert source["lengths"]["mean"] == pytest.approx(statistics.fmean(lengths), abs=0.05)
    assert source["lengths"]["p95"] == source["lengths"]["max"] == max(lengths)
    assert source["notes"] == ["1 exact duplicate, computed once in a step, with their number as weight"]
    assert json.loads(json.dumps(report)) == report


def test_cut_prompts_and_windows_are_noted(make: Make) -> None:
    write("a.jsonl", [*numbered(0, 2), ("Count: " + "1 2 3 " * 50, "Done.")])
    Path("b.txt").write_text("word " * 100)
    dataset = make(["a.jsonl", "b.txt"], max_tokens=64, on_long="cut_prompt")
    assert [source["notes"] for source in dataset.report()["sources"]] == [
        ["prompts cut: 1"],
        ["texts split into windows: 1"],
    ]
    assert max(len(sample) for sample in dataset.train) <= 64
    assert_report_adds_up(dataset)


def test_a_source_whose_records_are_all_dropped_has_no_lengths(make: Make) -> None:
    write("a.jsonl", numbered(0, 3))
    write("b.jsonl", [("Tell a story", "Once upon a time. " * 20)])
    dataset = make(["a.jsonl", "b.jsonl"], max_tokens=64)
    empty = dataset.report()["sources"][1]
    assert (empty["kept"], empty["lengths"], empty["tokens"]) == (0, None, 0)
    assert_report_adds_up(dataset)


def test_of_a_drawn_source_the_drawn_records_add_up(make: Make) -> None:
    write("a.jsonl", [*numbered(0, 30), *[("A question", "")] * 30])
    (source,) = make([{"path": "a.jsonl", "sample": 20}], eval_fraction=0.2).report()["sources"]
    assert source["read"] == 60
    assert source["kept"] + sum(source["dropped"].values()) == 20


# Fingerprints


def test_one_changed_byte_changes_the_fingerprints(make: Make) -> None:
    write("a.jsonl", numbered(0, 10))
    before = make(["a.jsonl"]).report()
    assert make(["a.jsonl"]).report() == before

    content = Path("a.jsonl").read_bytes()
    Path("a.jsonl").write_bytes(content.replace(b"It is 7", b"It is 8"))
    after = make(["a.jsonl"]).report()

    assert len(content) == len(Path("a.jsonl").read_bytes())
    assert after["fingerprint"] != before["fingerprint"]
    assert after["sources"][0]["fingerprint"] != before["sources"][0]["fingerprint"]
    changed = {key for key in after["sources"][0] if after["sources"][0][key] != before["sources"][0][key]}
    assert changed == {"fingerprint"}


def test_the_fingerprint_is_of_what_is_learnt_in_its_order(make: Make) -> None:
    write("a.jsonl", numbered(0, 10))
    write("turned.jsonl", numbered(0, 10)[::-1])
    write("first.jsonl", numbered(0, 5))
    write("second.jsonl", numbered(5, 10))
    usual = make(["a.jsonl"]).fingerprint
    others = [
        make(["turned.jsonl"]),
        make(["a.jsonl"], eval_fraction=0.1),
        make(["a.jsonl"], loss_on="all"),
        make(["first.jsonl"]),
        make(["second.jsonl", "first.jsonl"]),
        make(["first.jsonl"], eval=["second.jsonl"]),
    ]
    assert len({usual, *(dataset.fingerprint for dataset in others)}) == 7


def test_conversations_that_begin_alike_stay_on_one_side(tmp_path: Path, chat_tokenizer: Any) -> None:
    tokenizer, ends = chat_tokenizer("chatml")
    records = []
    for number in range(12):
        first = [{"role": "user", "content": f"Q{number}"}, {"role": "assistant", "content": f"A{number}"}]
        more = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Nothing."}]
        records += [{"messages": first}, {"messages": first + more}]
    path = tmp_path / "turns.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for seed in range(6):
        config = build(DataConfig, {"train": [{"path": str(path)}], "eval_fraction": 0.25}, "data")
        dataset = build_dataset(config, tokenizer, ends, seed)
        texts = [
            {tokenizer.decode(sample.input_ids).split("<|im_end|>")[0] for sample in samples}
            for samples in (dataset.train, dataset.eval["turns.jsonl"])
        ]
        assert texts[1]
        assert not texts[0] & texts[1]


def test_sources_of_one_name_are_all_evaluated(tmp_path: Path, chat_tokenizer: Any) -> None:
    tokenizer, ends = chat_tokenizer("chatml")
    paths = [tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl", tmp_path / "x.jsonl-2.jsonl"]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"query": f"Q{number}", "response": "A"}) + "\n")
    (tmp_path / "t.jsonl").write_text(json.dumps({"query": "T", "response": "A"}) + "\n")
    values = {"train": [{"path": str(tmp_path / "t.jsonl")}], "eval": [{"path": str(path)} for path in paths]}
    dataset = build_dataset(build(DataConfig, values, "data"), tokenizer, ends, 0)
    assert sum(len(samples) for samples in dataset.eval.values()) == 3


# Streaming


def read_all(dataset: Dataset) -> list[Sample]:
    """The samples of all windows."""
    assert dataset.stream is not None
    found, window = [], dataset.stream.read()
    while window.samples.supervised.any():
        found += list(window.samples)
        window = dataset.stream.read(window.ends)
    return found


def test_a_stream_leaves_out_the_questions_that_are_evaluated(make: Make, tokenizer: Any) -> None:
    write("a.jsonl", numbered(0, 30))
    write("eval.jsonl", numbered(20, 25, "Another answer: {}."))
    whole = make(["a.jsonl"], eval=["eval.jsonl"])
    streamed = make(["a.jsonl"], eval=["eval.jsonl"], streaming=True, window_samples=7)
    assert questions(read_all(streamed), tokenizer) == questions(whole.train, tokenizer)
    assert streamed.stream is not None
    report, expected = streamed.stream.report()[0], whole.report()["sources"][0]
    assert report["dropped"] == expected["dropped"] == {"its question is in data.eval, too": 5}


def test_a_window_of_nothing_to_learn_does_not_end_a_stream(make: Make, tokenizer: Any) -> None:
    write("a.jsonl", [*numbered(0, 10), *numbered(10, 25, "{}" + " 7" * 200), *numbered(25, 40)])
    rules = {"max_tokens": 64, "streaming": True}
    dataset = make(["a.jsonl"], window_samples=5, **rules)
    assert questions(read_all(dataset), tokenizer) == questions(make(["a.jsonl"], max_tokens=64).train, tokenizer)
    assert dataset.stream.report()[0]["dropped"] == {"longer than 64 tokens": 15}  # type: ignore[union-attr]
    write("b.jsonl", numbered(0, 5, "{}" + " 7" * 200))
    with pytest.raises(UsageError, match=r"No token is left to learn from data\.train \(longer than 64 tokens: 5\)"):
        make(["b.jsonl"], **rules)


def test_the_first_window_is_encoded_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl", numbered(0, 9))
    dataset = make(["a.jsonl"], streaming=True, window_samples=4)
    assert dataset.stream is not None
    with monkeypatch.context() as patched:
        patched.setattr("lory.data.mixture.stream.encode_all", lambda *_: pytest.fail("it was encoded again"))
        first = dataset.stream.read()
        assert list(first.samples) == list(dataset.train)
    assert [len(dataset.stream.read(starts).samples) for starts in ((4,), (8,), (), (4,))] == [4, 1, 4, 4]
