"""The page without its page: controls, answers as they grow, texts made safe, runs, and several models on one base."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lory.assistant import load
from lory.chat.review import ReviewItem
from lory.chat.variants import open_variants
from lory.chat.web.answers import Answer, judge, stream_answer, stream_side_by_side
from lory.chat.web.controls import list_controls, read_controls
from lory.chat.web.desk import Desk, find_trained
from lory.chat.web.markup import (
    format_clock,
    from_markdown,
    show_badge,
    show_chats,
    show_item,
    show_status,
    to_markdown,
)
from lory.chat.web.progress import read_run
from lory.cli.options import parse_adapters
from lory.generate import GenerationOptions
from lory.metrics.repetition import repetition_scores
from lory.runtime import UsageError

SHORT = GenerationOptions(max_new_tokens=12)
ASKED = [{"role": "user", "content": "Who are you?"}]


# Controls


def test_every_option_has_a_control_that_says_what_it_is() -> None:
    controls = list_controls(GenerationOptions())
    assert {control.name for control in controls} == set(GenerationOptions.model_fields)
    assert all(control.info for control in controls)


def test_untouched_controls_give_the_models_own_options() -> None:
    own = GenerationOptions(do_sample=True, temperature=0.6, top_k=300, penalty_alpha=0.6, seed=3, on_loop="stop")
    controls = list_controls(own)
    assert read_controls(controls, [control.value for control in controls]) == own


@pytest.mark.parametrize("end", ["minimum", "maximum"])
@pytest.mark.parametrize("control", list_controls(GenerationOptions()), ids=lambda control: control.name)
def test_the_ends_of_a_control_are_allowed_values(control: Any, end: str) -> None:
    if (value := getattr(control, end)) is not None:
        given = float(value)  # as a browser gives it
        options = read_controls([control], [given])
        assert getattr(options, control.name) == value


def test_an_empty_number_is_none_and_a_wrong_one_is_named() -> None:
    controls = {control.name: control for control in list_controls(GenerationOptions(seed=7))}
    assert read_controls([controls["seed"]], [None]).seed is None
    with pytest.raises(UsageError, match="top_p"):
        read_controls([controls["top_p"]], [1.5])


# Answers


def test_an_answer_grows_to_what_chat_gives_and_is_scored_like_a_sample_chat(tiny_model: Path) -> None:
    assistant = load(tiny_model)
    *growing, last = stream_answer(assistant, ASKED, SHORT, every=0.0)
    assert last.text == assistant.chat(ASKED, SHORT)
    assert growing
    assert all(last.text.startswith(answer.text) and not answer.ending for answer in growing)
    assert last.ending in ("stop", "length")
    ids = assistant.tokenizer(last.text, add_special_tokens=False)["input_ids"]
    assert (last.tokens, last.scores) == (len(ids), repetition_scores(ids))


def test_an_answer_that_is_stopped_keeps_what_was_said(tiny_model: Path) -> None:
    assistant, asked = load(tiny_model), 0

    def is_stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    *_, last = stream_answer(assistant, ASKED, SHORT, is_stopped)
    assert last.ending == "stopped"
    assert last.text
    assert assistant.chat(ASKED, SHORT).startswith(last.text)
    assert asked == 3


def test_closing_the_answer_stops_the_model(tiny_model: Path) -> None:
    assistant = load(tiny_model)
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    assistant.model.get_input_embeddings().register_forward_hook(count)
    stream = stream_answer(assistant, ASKED, GenerationOptions(max_new_tokens=200), every=0.0)
    next(stream)
    stream.close()
    assert steps < 20


def test_two_answers_grow_side_by_side() -> None:
    def grow(*texts: str) -> Iterator[Answer]:
        yield from (Answer(text) for text in texts)

    seen = [[answer.text for answer in pair] for pair in stream_side_by_side([grow("a"), grow("x", "xy", "xyz")])]
    assert seen == [["a", ""], ["a", "x"], ["a", "xy"], ["a", "xyz"]]


@pytest.mark.parametrize(("text", "level"), [("one two three four five", "fresh"), ("la la la " * 9, "parrots")])
def test_the_badge_says_in_words_how_much_is_repeated(text: str, level: str) -> None:
    scores = repetition_scores(text)
    assert judge(scores)[0] == level
    badge = show_badge(Answer(text, 9, 3.0, scores, "length"), "<mine>")
    assert judge(scores)[1] in badge
    assert f"seq-rep-4 {scores['seq_rep_4']:.2f}" in badge
    assert "3.0 tokens/s" in badge
    assert "&lt;mine&gt;" in badge
    assert "cut" in badge
    assert show_badge(None) == ""


# Texts


@pytest.mark.parametrize(
    "text",
    [
        "plain & simple",
        "<script>alert(1)</script>",
        "a < b && c > d",
        "&lt; is written &amp;lt;",
        "`<b>` and\n```html\n<p>&amp;</p>\n```\n<i>",
        "```\nunclosed <b>",
        "你好 <x>",
    ],
)
def test_markdown_made_safe_can_be_taken_back(text: str) -> None:
    assert from_markdown(to_markdown(text)) == text


def test_html_outside_of_code_is_shown_and_not_applied() -> None:
    assert "<" not in to_markdown("<img src=x onerror=alert(1)> <b>x</b>")
    assert to_markdown("`<b>`") == "`<b>`"


@pytest.mark.parametrize(
    "text",
    [
        r"\` <b>x</b> `",
        "see ``` here\n\n<b>x</b>",
        "~~~\n```\n~~~\n<b>x</b>",
        "````\n```\n````\n<b>x</b>",
        "- a\n\n  ```\n  x\n\n<b>x</b>",
        "```\nx\n``` y\n```\n<b>x</b>",
    ],
)
def test_html_beside_what_only_looks_like_code_is_shown(text: str) -> None:
    assert "<b>" not in to_markdown(text)
    assert from_markdown(to_markdown(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "``` html\n<b>\n\n```",
        "~~~\n<b>",
        "`` ` <b> ``",
        "1. a\n   ```\n   <b>\n\n   ```",
        "1. a\n    ```html\n    <b>\n    ```",
    ],
)
def test_code_is_left_as_it_is(text: str) -> None:
    assert to_markdown(text) == text


def test_an_item_for_review_is_escaped_and_its_repetitions_are_marked() -> None:
    says = "Use <b> now. " * 4
    item = ReviewItem([{"role": "user", "content": "<script>"}], says, "<reason>", {"seq_rep_4": 0.5}, "<model>")
    page = show_item(item)
    assert "<script>" not in page
    assert "<b> now" not in page
    assert "<reason>" not in page
    assert page.count("<mark>") == 4


# Several models on one base


def test_adapters_share_the_base_and_answer_as_alone(tiny_model: Path, tiny_adapter: Path) -> None:
    variants = open_variants(tiny_model, {"mine": str(tiny_adapter)}, {})
    assert list(variants) == [tiny_model.name, "mine"]
    base, mine = variants.values()
    shared = {parameter.data_ptr() for parameter in base.model.parameters()}
    own = {name: p for name, p in mine.model.named_parameters() if p.data_ptr() not in shared}
    assert own
    assert all("lora_" in name for name in own)
    assert base.chat(ASKED, SHORT) == load(tiny_model).chat(ASKED, SHORT)
    assert mine.chat(ASKED, SHORT) == load(tiny_adapter).chat(ASKED, SHORT)
    assert base.chat(ASKED, SHORT) != mine.chat(ASKED, SHORT)


def test_a_model_with_an_adapter_comes_with_its_base(tiny_model: Path, tiny_adapter: Path) -> None:
    variants = open_variants(tiny_adapter, {}, {})
    assert list(variants) == [tiny_adapter.name, "base"]
    assert variants["base"].chat(ASKED, SHORT) == load(tiny_model).chat(ASKED, SHORT)


def test_names_that_are_taken_are_refused(tiny_adapter: Path) -> None:
    with pytest.raises(UsageError, match="'base'"):
        open_variants(tiny_adapter, {"base": str(tiny_adapter)}, {})
    with pytest.raises(UsageError, match="twice"):
        parse_adapters(["a=x", "a=y"])
    with pytest.raises(UsageError, match="NAME=PATH"):
        parse_adapters(["a"])


# The desk


def test_a_visitor_is_answered_once_at_a_time_and_can_stop(tiny_model: Path) -> None:
    desk = Desk({"tiny": load(tiny_model)})
    desk.begin("ann")
    with pytest.raises(UsageError, match="stop it first"):
        desk.begin("ann")
    desk.begin("bob")
    answers = desk.answer("ann", "tiny", ASKED, GenerationOptions(max_new_tokens=300))
    desk.stop("ann")
    assert [answer.ending for answer in answers][-1] == "stopped"
    desk.end("ann")
    assert (desk.is_busy("ann"), desk.is_busy("bob")) == (False, True)
    desk.stop("nobody")


def test_the_desk_refuses_unknown_models_and_endless_texts(tiny_model: Path) -> None:
    desk = Desk({"tiny": load(tiny_model)})
    with pytest.raises(UsageError, match="'other'"):
        desk.answer("ann", "other", ASKED, SHORT)
    with pytest.raises(UsageError, match="characters"):
        desk.answer("ann", "tiny", [{"role": "user", "content": "x" * 300_000}], SHORT)


def test_only_uploaded_pictures_are_known(tiny_model: Path, tmp_path: Path) -> None:
    desk = Desk({"tiny": load(tiny_model)})
    inside, outside = tmp_path / "up" / "a.png", tmp_path / "b.png"
    inside.parent.mkdir()
    for path in (inside, outside):
        path.write_bytes(b"x")
    assert not desk.has_picture(str(inside))
    desk.keep_pictures_in(inside.parent)
    link = inside.parent / "link.png"
    link.symlink_to(outside)
    known = [desk.has_picture(str(path)) for path in (inside, outside, inside.parent / "../b.png", link, "a.png")]
    assert known == [True, False, False, False, False]


# Runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "v0-20260101-000000"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {}\n")
    (folder / "data.json").write_text('{"steps": 4}')
    log: list[dict[str, Any]] = [
        {"step": 0, "eval": {"loss": 4.0}},
        {"step": 1, "loss": 3.0, "learning_rate": 1e-3, "elapsed_seconds": 1.0, "remaining_seconds": 3.0},
        {"step": 2, "loss": None, "learning_rate": 5e-4, "elapsed_seconds": 2.0, "remaining_seconds": 2.0},
        {"step": 2, "eval": {"loss": 2.0}},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"step": 3, "lo')
    samples = [
        {"step": step, "prompt": "Who?", "answer": f"<b>{step}</b>", "repetition": {"seq_rep_4": 0.0}}
        for step in (0, 2)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    return folder


def test_a_run_is_read_while_it_is_written(run: Path) -> None:
    state = read_run(run.parent)
    assert (state.folder, state.step, state.steps, state.share, state.status) == (run, 2, 4, 0.5, "training")
    points = [(point.step, point.value, point.series) for point in state.points("loss")]
    assert points == [(0, 4.0, "evaluation"), (1, 3.0, "training"), (2, 2.0, "evaluation")]
    assert [sample.step for sample in state.chats()["Who?"]] == [2, 0]


def test_a_run_is_finished_quiet_or_starting(run: Path) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.write('ss": 1.0}\n')
    old = time.time() - 3600
    for name in ("log.jsonl", "samples.jsonl", "config.yaml"):
        os.utime(run / name, (old, old))
    assert read_run(run).step == 3
    assert "stopped" in read_run(run).status
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n')
    assert read_run(run).status == "finished"
    for name in ("log.jsonl", "samples.jsonl", "data.json"):
        (run / name).unlink()
    (run / "config.yaml").touch()
    state = read_run(run)
    assert (state.status, state.steps, state.share, state.samples) == ("starting", None, 0.0, ())


def test_a_run_is_shown_as_html_without_its_own(run: Path) -> None:
    state = read_run(run)
    status = show_status(state)
    assert 'aria-valuenow="50"' in status
    assert "step 2 of 4" in status
    assert "0:02 left" in status
    assert "&lt;b&gt;2&lt;/b&gt;" in show_chats(state.chats())
    assert "<b>2" not in show_chats(state.chats())
    assert "&lt;oh&gt;" in show_status(None, "<oh>")
    assert format_clock(3723) == "1:02:03"


def test_the_run_is_the_one_named_or_the_models_own(run: Path, tmp_path: Path) -> None:
    assert find_trained(str(run.parent), None) == run.parent
    assert find_trained("smollm2", run) == run
    assert find_trained("smollm2", None) is None
    with pytest.raises(UsageError):
        find_trained("smollm2", tmp_path / "nothing")


def test_an_answer_of_the_adapter_leaves_the_base_alone(tiny_model: Path, tiny_adapter: Path) -> None:
    """A copy of the modules holds no copy of the weights, also where the base is arranged for decoding."""
    base, mine = open_variants(tiny_model, {"mine": str(tiny_adapter)}, {}).values()
    inputs = torch.tensor([base.prompt_ids("Hi")])
    before = base.model(inputs).logits
    mine.chat("Hi", SHORT)
    assert torch.equal(base.model(inputs).logits, before)
