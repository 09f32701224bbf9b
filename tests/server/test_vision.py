"""Images in requests: what is said of them equals what the assistant says alone, and what is not allowed is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image
from tests.server.conftest import Server, running, wait_until
from tests.server.test_engine import make_job, start
from tests.vision_models import FAMILIES

import lory
from lory.generate import GenerationOptions, decode_text, generate_ids
from lory.server.catalogue import Catalogue, open_catalogue
from lory.server.limits import Limits
from lory.server.runner import Runner

GREEDY = GenerationOptions(do_sample=False)


def draw(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
    """A picture as a PNG file."""
    image, file = Image.new("RGB", (width, height), "white"), io.BytesIO()
    image.paste(colour, (width // 4, height // 4, width // 2, height - 3))
    image.save(file, "PNG")
    return file.getvalue()


PICTURES = (draw(40, 24, (200, 30, 60)), draw(24, 56, (10, 90, 250)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def make(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"seeing-{family}"
        if not folder.exists():
            FAMILIES[family](folder)
        return folder

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_about_images_in_a_batch_are_those_of_the_assistant(
    folders: Callable[[str], Path], family: str
) -> None:
    assistant = lory.load(folders(family))
    opened = open_catalogue(str(folders(family)), {}, "seeing")
    assert opened[1].joins_images
    questions: list[Any] = [
        [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "What is this?"}],
        "Who are you?",
        [{"type": "text", "text": "Compare "}, *({"type": "image", "image": picture} for picture in PICTURES)],
    ]
    prompts = [assistant.prompt([{"role": "user", "content": question}]) for question in questions]
    ends = [10**6]
    options = GREEDY.model_copy(update={"max_new_tokens": 14})
    expected = [
        decode_text(assistant.tokenizer, generate_ids(assistant.model, prompt, options, ends)) for prompt in prompts
    ]
    for joins in (True, False):
        opened[1].joins_images = joins
        engine = start(opened, max_batch=4)
        try:
            jobs = [
                make_job(opened[0], prompt.ids, 14, inputs=prompt.inputs, terminators=frozenset(ends))
                for prompt in prompts
            ]
            for job, _ in jobs:
                engine.submit(job)
            assert [inbox.read()[0] for _, inbox in jobs] == expected
        finally:
            engine.close()


@pytest.fixture(scope="module")
def opened(folders: Callable[[str], Path]) -> tuple[Catalogue, Runner]:
    return open_catalogue(str(folders("qwen2_vl")), {}, "seeing")


@pytest.fixture(scope="module")
def seeing(opened: tuple[Catalogue, Runner]) -> Iterator[Server]:
    """A server of a small Qwen2-VL."""
    limits = Limits(max_batch=4, images=3, image_bytes=20_000, image_pixels=4_000)
    with running(opened, limits) as server:
        yield server


def write_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def ask(server: Server, *urls: str, text: str = "What is this?", **more: Any) -> httpx.Response:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    body = {"messages": [message], "max_tokens": 12, "temperature": 0} | more
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)


def test_the_official_client_shows_an_image(seeing: Server, folders: Callable[[str], Path]) -> None:
    client = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="none", max_retries=0)
    parts: Any = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": write_url(PICTURES[0]), "detail": "low"}},
    ]
    messages: Any = [{"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="seeing", messages=messages, max_tokens=12, temperature=0)
    assistant = lory.load(folders("qwen2_vl"))
    options = GREEDY.model_copy(update={"max_new_tokens": 12})
    assert answer.choices[0].message.content == assistant.chat(messages, options)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(assistant.prompt(messages))
    chunks = client.chat.completions.create(
        model="seeing", messages=messages, max_tokens=12, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content


def test_equal_questions_about_other_images_get_other_answers(seeing: Server) -> None:
    # longer than the least that is kept for a next question
    text = "What is this? " * 10
    first, other, again = (ask(seeing, write_url(PICTURES[number]), text=text) for number in (0, 1, 0))
    texts = [answer.json()["choices"][0]["message"]["content"] for answer in (first, other, again)]
    assert texts[0] == texts[2] != texts[1]
    assert seeing.read_metric("lory_kept_tokens_total") == 0


def test_several_answers_to_one_image_are_counted_apart(seeing: Server) -> None:
    answer = ask(seeing, write_url(PICTURES[0]), n=3, temperature=1, seed=4, logprobs=True, logit_bias={"2": -100})
    assert len({choice["message"]["content"] for choice in answer.json()["choices"]}) == 3
    assert answer.json()["usage"]["completion_tokens"] == 36
    assert wait_until(lambda: seeing.engine.is_idle)


@pytest.mark.parametrize(
    ("urls", "more", "status", "sentence"),
    [
        (["/etc/passwd"], {}, 400, "files are not opened here"),
        (["file:///etc/passwd"], {}, 400, "an address of another kind"),
        (["http://127.0.0.1/x.png"], {}, 400, "nothing is fetched here"),
        (["data:text/html;base64,AAAA"], {}, 400, "of the type text/html"),
        (["data:image/png;base64,AAAA"], {}, 400, "none of the known formats"),
        ([write_url(PICTURES[0][:60])], {}, 400, "truncated or damaged"),
        ([write_url(draw(100, 50, (0, 0, 0)))], {}, 400, "more than the limit of 4,000"),
        ([write_url(b"\x89PNG" + bytes(21_000))], {}, 400, "more than 20,000 bytes"),
        ([write_url(PICTURES[0])] * 4, {}, 400, "has 4 images; at most 3"),
        ([write_url(PICTURES[0])], {"penalty_alpha": 0.6}, 400, "Contrastive search is for texts"),
        ([write_url(PICTURES[0])], {"text": "<image>"}, 400, "2 <image> marks and 1 image"),
        ([write_url(PICTURES[0])], {"text": "<|image_pad|>"}, 400, "2 marks for images"),
        ([], {"text": "<|image_pad|>"}, 400, "1 marks for images"),
        ([write_url(PICTURES[0])], {"text": "<|video_pad|>"}, 400, "mark for a video"),
    ],
)
def test_what_is_no_image_or_not_allowed_is_said(
    seeing: Server, urls: list[str], more: dict[str, Any], status: int, sentence: str
) -> None:
    answer = ask(seeing, *urls, **more)
    assert answer.status_code == status
    assert sentence in answer.json()["error"]["message"]
    assert "Traceback" not in answer.text


def test_links_are_followed_where_allowed_but_never_into_private_networks(opened: tuple[Catalogue, Runner]) -> None:
    with running(opened, Limits(image_links=True, image_seconds=1)) as server:
        port = server.url.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost", "[::1]", "10.0.0.1", "169.254.169.254"):
            answer = ask(server, f"http://{host}:{port}/v1/models")
            assert answer.status_code == 400
            assert "not on the public net" in answer.json()["error"]["message"]


def test_images_that_wait_are_limited(opened: tuple[Catalogue, Runner]) -> None:
    with running(opened, Limits(image_memory_bytes=100)) as server:
        answer = ask(server, write_url(PICTURES[0]))
        assert answer.status_code == 429
        assert "full of images" in answer.json()["error"]["message"]
        assert ask(server, text="Who are you?").status_code == 200


def test_adapters_on_a_model_that_sees_share_a_batch(folders: Callable[[str], Path], tmp_path: Path) -> None:
    from lory.adapters.files import save_adapter
    from lory.adapters.inject import AdapterConfig, adapted_layers, attach_lora

    base = folders("qwen2_vl")
    for name, seed in (("one", 1), ("two", 2)):
        model = lory.load(base).model
        attach_lora(model, AdapterConfig(rank=3, alpha=7))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, layer in adapted_layers(model):
                layer.lora_A.normal_(std=0.3, generator=generator)
                layer.lora_B.normal_(std=0.3, generator=generator)
        (tmp_path / name).mkdir()
        save_adapter(model, tmp_path / name, str(base))
    adapters = {name: str(tmp_path / name) for name in ("one", "two")}
    opened = open_catalogue(str(base), adapters, "seeing")
    question: Any = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "What is this?"}]
    options, ends = GREEDY.model_copy(update={"max_new_tokens": 12}), [10**6]
    expected, jobs = [], []
    for number, folder in ((None, str(base)), (0, adapters["one"]), (1, adapters["two"])):
        assistant = lory.load(folder)
        prompt = assistant.prompt([{"role": "user", "content": question}])
        expected.append(decode_text(assistant.tokenizer, generate_ids(assistant.model, prompt, options, ends)))
        more = {"inputs": prompt.inputs, "terminators": frozenset(ends), "adapter": number}
        jobs.append(make_job(opened[0], prompt.ids, 12, **more))
    assert len(set(expected)) == 3
    engine = start(opened, max_batch=4)
    try:
        for job, _ in jobs:
            engine.submit(job)
        assert [inbox.read()[0] for _, inbox in jobs] == expected
    finally:
        engine.close()
