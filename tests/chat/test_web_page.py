"""The page in a browser: what a visitor types, clicks and sees. Without a Chromium or playwright these are skipped."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lory.assistant import load
from lory.chat.review import ReviewItem, enqueue, read_queue
from lory.chat.variants import open_variants
from lory.chat.web.desk import Desk

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from lory.chat.web.run import serve_page  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]
MILLISECONDS = 60_000
EVIL = "<img src=x onerror=\"document.title='taken'\"> ![](http://192.0.2.1/a.png) **bold**"


@pytest.fixture(scope="module")
def desk(tiny_model: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("page")
    for number in range(3):
        enqueue(folder / "queue.jsonl", ReviewItem([{"role": "user", "content": EVIL}], f"answer {number}"))
    run = folder / "v0-run"
    run.mkdir()
    (run / "config.yaml").write_text("{}\n")
    (run / "data.json").write_text('{"steps": 10}')
    (run / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    return Desk(open_variants(tiny_model, {"mine": str(tiny_adapter)}, {}), folder / "queue.jsonl", run)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(desk: Desk) -> Iterator[str]:
    with serve_page(desk) as (address, _):
        yield address


@pytest.fixture(scope="module")
def seeing(vision_model: Callable[[str], Path]) -> Iterator[str]:
    """The address of a page for a model that sees."""
    with serve_page(Desk({"eye": load(vision_model("qwen2_vl"))})) as (address, _):
        yield address


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Callable[..., Page]]:
    """A function that opens the page as a new visitor; that the page asks no other host for anything is checked."""
    contexts: list[Any] = []
    hosts, blocked, own = set(), set(), {name_host(address)}

    def open_page(url: str = address, **settings: Any) -> Page:
        context = browser.new_context(**settings)
        contexts.append(context)
        context.set_default_timeout(MILLISECONDS)
        page = context.new_page()
        page.on("request", lambda request: hosts.add(name_host(request.url)))
        page.on("requestfailed", lambda request: "csp" in str(request.failure) and blocked.add(name_host(request.url)))
        own.add(name_host(url))
        page.goto(url)
        page.locator("#lory-box textarea").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    # what the page's policy has stopped never left the browser
    assert hosts - blocked - {""} <= own


def name_host(url: str) -> str:
    """The host and port in a URL; empty for data."""
    return url.partition("//")[2].partition("/")[0]


def ask(page: Page, text: str, box: str = "#lory-box") -> None:
    page.fill(f"{box} textarea", text)
    page.keyboard.press("Enter")


def wait_for_rest(page: Page, box: str = "#lory-box") -> None:
    """Wait until the answer has ended."""
    page.locator(f"{box} [data-testid=stop-button]").wait_for(state="detached")
    page.locator(f"{box} [data-testid=submit-button], {box} .submit-button").first.wait_for()


def set_length(page: Page, tokens: int) -> None:
    page.fill("#lory-max_new_tokens input[type=number]", str(tokens))
    page.keyboard.press("Tab")


def answers(page: Page) -> list[str]:
    return page.locator("#lory-chat .bot.message, #lory-chat [data-testid=bot]").all_inner_texts()


def test_an_answer_is_given_anew_and_kept_over_a_reload(visit: Callable[..., Page], desk: Desk) -> None:
    page = visit()
    set_length(page, 6)
    ask(page, EVIL)
    page.get_by_role("button", name="Regenerate").and_(page.locator(":enabled")).wait_for()
    assert "seq-rep-4" in page.locator("#lory-badge").inner_text()
    said = desk.first.chat(
        [{"role": "user", "content": EVIL}], desk.first.options.model_copy(update={"max_new_tokens": 6})
    )
    assert said.split() == "".join(answers(page)[-1:]).split()
    shown = page.locator("#lory-chat").inner_text()
    assert "<img src=x" in shown
    assert "**" not in shown
    page.check("#lory-do_sample input")
    page.get_by_role("button", name="Regenerate").click()
    page.get_by_text("branch 2 of 2").wait_for()
    page.reload()
    page.get_by_text("branch 2 of 2").wait_for()
    page.locator("#lory-back").click()
    page.get_by_text("branch 1 of 2").wait_for()
    page.get_by_role("button", name="Delete this conversation").click()
    page.wait_for_function("Object.keys(localStorage).filter((key) => key.startsWith('lory:')).length == 0")
    assert page.title() == f"lory · {desk.names[0]}"


def test_a_picture_is_shown_to_a_model_that_sees(
    visit: Callable[..., Page], seeing: str, address: str, tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (64, 48), "orange").save(tmp_path / "orange.png")
    assert visit().locator("input[type=file]").count() == 0
    page = visit(seeing)
    set_length(page, 6)
    page.locator("#lory-box input[type=file]").set_input_files(tmp_path / "orange.png")
    page.locator("#lory-box img").first.wait_for()
    ask(page, "What is it?")
    page.get_by_role("button", name="Regenerate").and_(page.locator(":enabled")).wait_for()
    assert "seq-rep-4" in page.locator("#lory-badge").inner_text()
    picture = page.locator("#lory-chat img").first
    assert picture.evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [64, 48]


def test_a_question_is_edited_and_sent_again(visit: Callable[..., Page]) -> None:
    page = visit()
    set_length(page, 6)
    ask(page, "one <b>")
    page.get_by_role("button", name="Regenerate").and_(page.locator(":enabled")).wait_for()
    page.locator("#lory-chat button[aria-label='Edit']").click()
    page.locator("#lory-chat textarea").fill("two <i>")
    page.locator("#lory-chat button[aria-label='Submit']").click()
    page.get_by_text("branch 2 of 2").wait_for()
    assert "two <i>" in page.locator("#lory-chat").inner_text()
    assert "one" not in page.locator("#lory-chat").inner_text()


def test_a_visitor_stops_an_answer_and_one_who_leaves_stops_the_model(visit: Callable[..., Page], desk: Desk) -> None:
    steps = 0

    def slow_down(*_: Any) -> None:
        nonlocal steps
        steps += 1
        time.sleep(0.05)

    hook = desk.first.model.get_input_embeddings().register_forward_hook(slow_down)
    try:
        page = visit()
        ask(page, "Count")
        page.locator("#lory-badge .lory-badge").wait_for()
        # what would take the conversation away meanwhile is refused
        page.get_by_role("button", name="New conversation").click()
        page.get_by_text("stop it first").wait_for()
        page.locator("#lory-box [data-testid=stop-button]").click()
        page.get_by_text("stopped").wait_for()
        assert answers(page)
        ask(page, "Count on")
        page.locator("#lory-box [data-testid=stop-button]").wait_for()
        page.close()
        end = time.monotonic() + 30
        while desk.is_answering and time.monotonic() < end:
            time.sleep(0.1)
        assert not desk.is_answering
        seen = steps
        time.sleep(0.3)
        assert steps == seen
    finally:
        hook.remove()


def test_each_visitor_has_conversations_of_their_own(visit: Callable[..., Page]) -> None:
    keys = "Object.keys(localStorage).filter((key) => key.startsWith('lory:'))"
    kept = []
    for name in ("ann", "bob"):
        page = visit()
        set_length(page, 4)
        ask(page, name)
        page.locator("#lory-conversations label", has_text=name).wait_for()
        page.wait_for_function(f"{keys}.length == 1")
        kept += page.evaluate(keys)
        assert page.locator("#lory-conversations label").all_inner_texts() == [name]
    assert len(set(kept)) == 2


def test_two_models_answer_side_by_side(visit: Callable[..., Page], desk: Desk) -> None:
    page = visit()
    set_length(page, 6)
    page.get_by_role("tab", name="Side by side").click()
    ask(page, "Who are you?", "#lory-compare-box")
    options = desk.first.options.model_copy(update={"max_new_tokens": 6})
    for side, name in (("left", desk.names[0]), ("right", "mine")):
        said = desk.assistants[name].chat("Who are you?", options)
        page.wait_for_function(
            "([id, text]) => document.querySelector(id).innerText.replace(/\\s/g, '').includes(text)",
            arg=[f"#lory-{side}", "".join(said.split())],
        )


def test_answers_are_accepted_edited_and_rejected(visit: Callable[..., Page], desk: Desk) -> None:
    page = visit()
    page.get_by_role("tab", name="Review").click()
    page.get_by_text("3 to review").wait_for()
    page.get_by_role("button", name="Accept", exact=True).click()
    page.get_by_text("2 to review").wait_for()
    page.fill("#lory-edited textarea", "a better answer")
    page.get_by_role("button", name="Accept as edited").click()
    page.get_by_text("1 to review").wait_for()
    page.get_by_role("button", name="Reject").click()
    page.get_by_text("There is nothing to review").wait_for()
    assert desk.queue is not None
    assert [(one.decision, one.text) for one in read_queue(desk.queue)] == [
        ("accept", ""),
        ("edit", "a better answer"),
        ("reject", ""),
    ]
    assert "taken" not in page.title()


def test_a_run_is_followed_while_it_trains(visit: Callable[..., Page], desk: Desk) -> None:
    page = visit()
    page.get_by_role("tab", name="Training").click()
    page.get_by_text("step 1 of 10").wait_for()
    assert desk.run is not None
    with (desk.run / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 2.0}\n')
    page.get_by_text("step 5 of 10").wait_for()
    page.locator("#lory-plot-loss canvas, #lory-plot-loss svg").first.wait_for()
    assert page.locator("[role=progressbar]").get_attribute("aria-valuenow") == "50"


def test_a_phone_and_a_keyboard_are_enough(visit: Callable[..., Page]) -> None:
    page = visit(viewport={"width": 380, "height": 750}, color_scheme="dark")
    page.locator(".sidebar:not(.open)").wait_for(state="attached")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("#lory-box textarea").focus()
    page.keyboard.type("Hi")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    again = page.get_by_role("button", name="Regenerate")
    again.and_(page.locator(":enabled")).wait_for()
    for _ in range(12):
        page.keyboard.press("Tab")
        if again.evaluate("(button) => button === document.activeElement"):
            break
    page.keyboard.press("Enter")
    page.get_by_text("branch 2 of 2").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
