"""`lory.evaluate`: figures agree with the model's own logits and answers, and nothing is lost or left unsaid."""

from __future__ import annotations

import json
import math
import re
import signal
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lory.adapters import prompt
from lory.adapters.encoders import PromptConfig
from lory.assistant import Assistant, load
from lory.data.encoding.encode import Encoder
from lory.data.sources.config import SourceConfig
from lory.evaluate.answers import Prediction
from lory.evaluate.page import draw_page
from lory.evaluate.prediction import Predictor
from lory.evaluate.records import Question, Record, read_sources
from lory.evaluate.run import Evaluation, Settings, evaluate
from lory.evaluate.scores import find_classes, score_answers, score_classes, score_each
from lory.evaluate.tasks import run_tasks
from lory.generate import GenerationOptions
from lory.runtime import UsageError
from lory.types import IGNORE, Conversation


@pytest.fixture(scope="module")
def assistant(tiny_model: Path) -> Assistant:
    """The tiny random model; what is put on it has to be taken off again."""
    return load(tiny_model)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two plain texts, a long one and a short one."""
    path = tmp_path / "texts.jsonl"
    long = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 2
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (long, "Who?")))
    return path


def source(path: Path, **values: Any) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), **values})


def write_chats(path: Path, pairs: Sequence[tuple[str, str]]) -> Path:
    lines = [
        json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
        for q, a in pairs
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def read_records(assistant: Assistant, path: Path) -> list[Record]:
    encoder = Encoder(assistant.tokenizer, assistant.terminators, 200)
    return read_sources([source(path)], encoder, None)[0].records


# Prediction


def test_loss_and_accuracy_are_those_of_the_models_own_logits(assistant: Assistant, records: Path) -> None:
    scores = evaluate(assistant, [source(records)]).sources[records.name]["prediction"]
    losses, right = [], []
    for record in read_records(assistant, records):
        (sample,) = record.samples
        with torch.no_grad():
            logits = assistant.model(torch.tensor([sample.input_ids])).logits[0, :-1]
        labels = torch.tensor(sample.labels[1:])
        learnt = labels != IGNORE
        losses += torch.nn.functional.cross_entropy(logits[learnt], labels[learnt], reduction="none").tolist()
        right += (logits.argmax(1) == labels)[learnt].tolist()
    assert scores["tokens"] == len(losses)
    assert scores["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["token_accuracy"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("kind", [None, "prompt", "prefix"])
def test_packed_and_padded_rows_give_the_same_and_so_do_soft_prompts(
    tiny_model: Path, records: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None
) -> None:
    assistant = load(tiny_model)
    if kind:
        prompt.attach(assistant.model, PromptConfig(type=kind, virtual_tokens=3))
    sources = [source(records), source(texts)]
    packed = evaluate(assistant, sources).total["prediction"]
    monkeypatch.setattr("lory.evaluate.prediction.keeps_documents_apart", lambda *_: False)
    monkeypatch.setattr("lory.evaluate.prediction._CPU_TOKENS", 200)
    assert evaluate(assistant, sources).total["prediction"] == pytest.approx(packed, rel=1e-4)


def test_logits_of_few_positions_exist_at_a_time_and_each_record_has_its_own_loss(
    assistant: Assistant, records: Path
) -> None:
    own = read_records(assistant, records)
    predictor = Predictor(assistant.model, 200, 0)
    head, sizes = predictor.head, []
    predictor.head = lambda hidden: (sizes.append(len(hidden)), head(hidden))[1]  # type: ignore[assignment]
    totals = predictor.measure(own, lambda: False, lambda done, total: None)
    assert max(sizes) <= 256
    assert sum(sizes) == totals.counts.predicted == totals.weight == sum(record.supervised for record in own)
    assert math.fsum(record.loss for record in own) == pytest.approx(totals.loss, rel=1e-6)
    alone = Predictor(assistant.model, 200, 0).measure(own[5:6], lambda: False, lambda done, total: None)
    assert own[5].loss == pytest.approx(2 * alone.loss, rel=1e-5)  # the first time and the second


def test_tokens_count_as_much_as_their_message(assistant: Assistant, tmp_path: Path) -> None:
    def chat(*weights: float | None) -> Path:
        path = tmp_path / f"{'-'.join(map(str, weights))}.jsonl"
        messages: list[dict[str, Any]] = []
        for number, weight in enumerate(weights):
            answer = {"role": "assistant", "content": f"It is {number}." + " I am sure." * number}
            answer |= {} if weight is None else {"weight": weight}
            messages += [{"role": "user", "content": f"Number {number}?"}, answer]
        path.write_text(json.dumps({"messages": messages}) + "\n")
        return path

    first, second, both, weighted = (
        evaluate(assistant, [source(chat(*weights))]).total["prediction"]
        for weights in ((None, 0), (0, None), (None, None), (0.5, 2))
    )
    # the same texts in the same places, of which other parts count
    assert both["tokens"] == weighted["tokens"] == first["tokens"] + second["tokens"]
    one, other = first["tokens"] * 0.5, second["tokens"] * 2
    for name in ("loss", "token_accuracy"):
        mean = (one * first[name] + other * second[name]) / (one + other)
        assert weighted[name] == pytest.approx(mean, rel=1e-5)
    assert weighted["loss"] != pytest.approx(both["loss"], rel=1e-3)
    assert weighted["perplexity"] == pytest.approx(math.exp(weighted["loss"]))
    assert weighted["rep"] == both["rep"]


def test_what_is_too_long_is_left_out_and_counted(assistant: Assistant, records: Path) -> None:
    scores = evaluate(assistant, [source(records)], Settings(max_tokens=40)).sources[records.name]
    assert scores["records"] + sum(scores["dropped"].values()) == scores["read"] == 24
    assert list(scores["dropped"]) == ["longer than 40 tokens"]
    with pytest.raises(UsageError, match=r"no record to evaluate on: 24 longer than 8 tokens; .*--max-tokens"):
        evaluate(assistant, [source(records)], Settings(max_tokens=8))


def test_sources_of_the_same_name_are_kept_apart_and_add_up(assistant: Assistant, records: Path) -> None:
    found = evaluate(assistant, [source(records, sample=5), source(records)], Settings(most_records=7))
    one, other = found.sources[records.name], found.sources[f"{records.name}-2"]
    assert (one["records"], other["records"], found.total["records"]) == (5, 7, 12)
    tokens = [scores["prediction"]["tokens"] for scores in (one, other, found.total)]
    assert tokens[0] + tokens[1] == tokens[2]
    assert [p.kind for p in found.predictions] == ["record"] * 12


def test_of_long_texts_so_many_windows_are_read(assistant: Assistant, texts: Path) -> None:
    whole = evaluate(assistant, [source(texts)], Settings(max_tokens=16))
    part = evaluate(assistant, [source(texts)], Settings(max_tokens=16, most_records=3))
    assert (part.total["records"], part.total["prediction"]["tokens"]) == (2, 15 + 15 + 3)
    assert whole.total["prediction"]["tokens"] > 40
    assert any("windows of plain texts that are read: 3 of " in note for note in part.sources[texts.name]["notes"])


# Answers


def test_answers_are_those_of_the_chat_and_stand_beside_their_targets(assistant: Assistant, records: Path) -> None:
    options = GenerationOptions(max_new_tokens=9)
    settings = Settings(generate=True, options=options, batch_size=5)
    found = evaluate(assistant, [source(records)], settings)
    assert len(found.predictions) == 24
    for number in (0, 13, 23):
        prediction = found.predictions[number]
        assert prediction.answer == assistant.chat(prediction.prompt, options)
        assert prediction.prompt == [{"role": "user", "content": f"{number} and 7?"}]
        assert prediction.target == f"It is {number + 7}." + " I am sure." * (number % 4)
        assert prediction.place.endswith(f"line {number + 1}")
        assert {"exact_match", "edit_distance", "loss", "seq_rep_4"} <= set(prediction.scores)
    scores = found.sources[records.name]["answers"]
    assert scores["answers"] == 24
    assert scores["cut"] == sum(prediction.tokens == 9 for prediction in found.predictions) > 0
    assert {"bleu", "rougeL", "repetition", "target_repetition", "parroting"} <= set(scores)


def test_several_answers_are_sampled_repeatably(assistant: Assistant, records: Path) -> None:
    options = GenerationOptions(max_new_tokens=6, do_sample=True, seed=3)
    settings = Settings(generate=True, options=options, answers=3, batch_size=1, most_records=3)
    one, other = (evaluate(assistant, [source(records)], settings) for _ in range(2))
    assert [p.answer for p in one.predictions] == [p.answer for p in other.predictions]
    assert [p.sample for p in one.predictions] == [0, 1, 2] * 3
    assert len({p.answer for p in one.predictions[:3]}) > 1
    assert 0 <= one.total["answers"]["self_similarity"] < 1
    with pytest.raises(UsageError, match="need sampling"):
        evaluate(assistant, [source(records)], Settings(generate=True, answers=2))


def test_a_text_is_continued_greedily_for_exactly_so_many_tokens(
    assistant: Assistant, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what the model wrote fourth now ends answers; the text goes on all the same
    first = evaluate(assistant, [source(texts)], Settings(continuation=(6, 11))).predictions[1]
    monkeypatch.setattr(assistant, "terminators", (first.answer_ids[3],))
    found = evaluate(assistant, [source(texts)], Settings(continuation=(6, 11)))
    continued = [p for p in found.predictions if p.kind == "continuation"]
    ids = assistant.tokenizer(json.loads(texts.read_text().splitlines()[0])["text"])["input_ids"]
    assert len(continued) == len(ids) // 17 == found.total["continuations"]["continuations"]
    question = continued[1].question
    assert question is not None
    assert [*question.prompt_ids, *question.target_ids] == ids[17:34]
    row = list(question.prompt_ids)
    for _ in range(11):
        with torch.no_grad():
            logits = assistant.model(torch.tensor([row])).logits[0, -1]
        logits[list(assistant.terminators)] = -torch.inf
        row.append(int(logits.argmax()))
    assert continued[1].answer_ids == tuple(row[6:])
    assert "texts shorter than 17 tokens, which are not continued: 1" in found.sources[texts.name]["notes"]


def test_a_text_has_no_prompt_and_a_prompt_that_fills_the_context_no_answer(
    assistant: Assistant, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(generate=True, options=GenerationOptions(max_new_tokens=2))
    notes = evaluate(assistant, [source(texts)], settings).sources[texts.name]["notes"]
    assert any("2 plain texts have no prompt" in note for note in notes)
    chats = write_chats(tmp_path / "chats.jsonl", [("Who are you?", "I."), ("word " * 30, "I.")])
    monkeypatch.setattr(assistant.model.config, "max_position_embeddings", 60)
    with pytest.raises(UsageError, match="exceed the context, 60"):
        evaluate(assistant, [source(texts)], Settings(continuation=(50, 100)))
    dropped = evaluate(assistant, [source(chats)], settings).sources["chats.jsonl"]
    assert (dropped["records"], dropped["dropped"]) == (1, {"longer than 60 tokens": 1})


def test_ctrl_c_keeps_what_is_there(assistant: Assistant, records: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)

    def press(title: str, done: int, total: int) -> None:
        if title.startswith("Answering") and done == 8:
            signal.raise_signal(signal.SIGINT)

    settings = Settings(generate=True, options=GenerationOptions(max_new_tokens=3), batch_size=4)
    found = evaluate(assistant, [source(records), source(records)], settings, press)
    assert found.interrupted
    assert signal.getsignal(signal.SIGINT) is before
    assert sum(p.kind == "answer" for p in found.predictions) == found.total["answers"]["answers"] == 8
    assert found.sources[f"{records.name}-2"]["prediction"] == {"tokens": 0}
    found.write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["interrupted"] is True


# Scores


def predictions_of(pairs: Sequence[tuple[str, str]]) -> list[Prediction]:
    """Answers with their targets, to prompts of their own; ids are the texts' bytes."""
    made = []
    for number, (answer, target) in enumerate(pairs):
        messages = [{"role": "user", "content": f"Question {number}"}]
        record = Record(Conversation(where=f"line {number}"), (), 3.0, 1, 2)
        question = Question(record, (1,), tuple(target.encode()), messages, target)
        ids = tuple(answer.encode())
        made.append(
            Prediction("s", "answer", f"line {number}", messages, target, answer, question=question, answer_ids=ids)
        )
    score_each(made)
    return made


def test_answers_are_compared_with_their_targets() -> None:
    loop = "I do not know what to say. " * 5
    made = predictions_of([("Paris", "Paris"), ("Rome", "Rome."), ("", "Oslo"), (loop, "Well.")])
    scores = score_answers(made, [])
    assert (scores["exact_match"], scores["empty"]) == (0.25, 1)
    assert made[1].scores["edit_distance"] == pytest.approx(1 / 5)
    assert made[0].scores["loss"] == 1.5
    assert scores["parroting"] == {"word": 0, "sentence": 1, "answer": 0, "evasion": 0}
    assert made[3].parroting == ["sentence"]
    assert not any(scores["target_parroting"].values())
    assert scores["repetition"]["seq_rep_4"] > scores["target_repetition"]["seq_rep_4"] == 0


def test_the_same_answer_to_different_prompts_is_an_evasion() -> None:
    made = predictions_of([("I am not sure about that.", f"It is number {n}.") for n in range(4)])
    assert score_answers(made, [])["parroting"]["evasion"] == 4


def test_without_the_extra_libraries_the_rest_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sacrebleu", "rouge_score", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    made, notes = predictions_of([("yes", "yes"), ("no", "yes")] * 4), []
    scores = score_answers(made, notes)
    assert scores["exact_match"] == 0.5
    assert not {"bleu", "rougeL"} & set(scores)
    assert score_classes([*made, *predictions_of([("no", "no")] * 4)], notes) is None
    assert [note.split()[0] for note in notes] == ["BLEU", "ROUGE", "Class"]
    assert all("pip install 'lory-llm[eval]'" in note for note in notes)


def test_short_labels_from_a_small_set_are_classes() -> None:
    pairs = [("Positive.", "positive"), ("negative", "negative"), ("I think so", "negative"), (" POSITIVE", "positive")]
    scores = score_classes(predictions_of(pairs * 2), [])
    assert scores is not None
    assert (scores["classes"], scores["unknown"], scores["accuracy"]) == (2, 2, 0.75)
    assert {"f1_macro", "mcc"} <= set(scores)


@pytest.mark.parametrize(
    "labels",
    [
        ["a", "b", "c", "d"],  # as many classes as answers
        ["yes"] * 20,  # one class
        ["a label of far too many words", "b"] * 10,
        ["", "b"] * 10,
    ],
)
def test_other_targets_are_no_classes(labels: list[str]) -> None:
    assert find_classes(labels) == set()


# Files


def test_the_files_hold_everything_worst_first_and_escaped(tmp_path: Path) -> None:
    evil = "</pre><script src='https://example.com/x.js'></script>"
    made = predictions_of([("fine", "fine"), (evil, "a <b>target</b>"), ("fin", "fine")])
    found = Evaluation("m", {}, {"perplexity": math.inf}, made, [], False)
    found.write(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "predictions.html",
        "predictions.jsonl",
        "scores.json",
    ]
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["all"] == {"perplexity": None}
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [row["place"] for row in rows] == ["line 0", "line 1", "line 2"]
    assert rows[1]["answer"] == evil
    assert not {"question", "answer_ids"} & set(rows[0])
    page = (tmp_path / "out" / "predictions.html").read_text()
    assert re.findall(r"line \d", page) == ["line 1", "line 2", "line 0"]
    assert not re.search(r"<script|<b>target|(src|href)\s*=|url\(|@import", page.replace("src=&#x27;", ""))
    assert "color-scheme: light dark" in page
    assert "default-src 'none'" in page


def test_differences_are_marked_where_texts_are_close() -> None:
    page = draw_page("m", predictions_of([("It is 8 & so on.", "It is 9 & so on.")]))
    assert "It is <del>9</del> &amp; so on." in page
    assert "It is <ins>8</ins> &amp; so on." in page


# lm-eval


@pytest.fixture
def fake_lm_eval(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the three things that are used of lm-eval; gives what they were called with."""
    calls: dict[str, Any] = {}

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            calls["include_path"] = include_path

        def match_tasks(self, names: list[str]) -> list[str]:
            return [name for name in names if name == "arc_easy"]

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        calls.update(arguments)
        return {"results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5}}}

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **arguments: arguments},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, values in modules.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_lm_eval_is_handed_the_loaded_model(assistant: Assistant, fake_lm_eval: dict[str, Any], tmp_path: Path) -> None:
    assert run_tasks(assistant, ["arc_easy"], 5, 2, tmp_path)["arc_easy"]["acc,none"] == 0.5
    assert fake_lm_eval["model"]["pretrained"] is assistant.model
    assert fake_lm_eval["model"]["tokenizer"] is assistant.tokenizer
    assert (fake_lm_eval["limit"], fake_lm_eval["include_path"]) == (5, str(tmp_path))
    with pytest.raises(UsageError, match="knows no task 'arc_esay'"):
        run_tasks(assistant, ["arc_esay"])


def test_lm_eval_is_refused_where_it_would_measure_something_else_or_is_missing(
    assistant: Assistant, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="pip install 'lm-eval"):
        run_tasks(assistant, ["arc_easy"])
    with pytest.raises(UsageError, match="is no folder"):
        run_tasks(assistant, ["arc_easy"], folder=tmp_path / "missing")
    prompted = load(tiny_model)
    prompt.attach(prompted.model, PromptConfig(type="prompt", virtual_tokens=2))
    with pytest.raises(UsageError, match="without its soft prompt"):
        run_tasks(prompted, ["arc_easy"])
