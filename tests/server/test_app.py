"""The official client, and any other, against a server on loopback."""

from __future__ import annotations

import json
from itertools import accumulate
from typing import Any

import httpx
import openai
import pytest
from tests.server.conftest import Server

import lory
from lory.generate import GenerationOptions
from lory.server.exchange import _write_event

MESSAGES: Any = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **options: Any) -> Any:
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0} | options
    return client.chat.completions.create(**options)


def test_a_chat_is_answered_and_counted(client: openai.OpenAI, server: Server) -> None:
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    prompt = len(
        server.catalogue.list()[0].tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    )
    assert answer.usage.prompt_tokens == prompt
    assert 0 < answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == prompt + answer.usage.completion_tokens


def test_a_stream_says_the_same_as_the_whole(client: openai.OpenAI) -> None:
    whole = ask(client, n=2, seed=3, temperature=1, logprobs=True)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(client, n=2, seed=3, temperature=1, logprobs=True, **options))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    for number in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == number]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == whole.choices[number].message.content
        assert own[-1].finish_reason == whole.choices[number].finish_reason
        scored = [token for choice in own if choice.logprobs for token in choice.logprobs.content or []]
        # the two runs may round in different ways
        assert [token.token for token in scored] == [token.token for token in whole.choices[number].logprobs.content]


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    text = ask(client, max_tokens=40).choices[0].message.content
    stop = text[7:10]
    answer = ask(client, max_tokens=40, stop=["never said", stop])
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 40
    streamed = ask(client, max_tokens=40, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text[: text.index(stop)]


def test_a_seed_repeats_and_seeds_differ(client: openai.OpenAI) -> None:
    texts = [ask(client, temperature=1.5, seed=seed).choices[0].message.content for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    several = ask(client, temperature=1.5, seed=5, n=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert [choice.message.content for choice in several.choices][:2] == [texts[0], texts[2]]


def test_logprobs_are_those_of_the_tokens_said(client: openai.OpenAI) -> None:
    answer = ask(client, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    for token in content:
        assert len(token.top_logprobs) == 3
        # greedy: the likeliest is what was said
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == token.logprob <= 0
    said = bytes(byte for token in content for byte in token.bytes)
    assert said.decode("utf-8", "replace") == answer.choices[0].message.content


def test_adapters_are_models_of_their_own(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "one", "two", "three"]
    assert client.models.retrieve("two").id == "two"
    texts = {name: ask(client, model=name).choices[0].message.content for name in names}
    assert len(set(texts.values())) == 4


def test_texts_are_continued(client: openai.OpenAI) -> None:
    both = client.completions.create(model="tiny", prompt=["The fox", "Two and two"], max_tokens=5, temperature=0)
    one = client.completions.create(model="tiny", prompt="Two and two", max_tokens=5, temperature=0)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[1].text == one.choices[0].text
    echoed = client.completions.create(
        model="tiny", prompt="Two and two", max_tokens=5, temperature=0, echo=True, logprobs=2
    )
    assert echoed.choices[0].text == "Two and two" + one.choices[0].text
    logprobs = echoed.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert "".join(logprobs.tokens).startswith("Two and two")
    assert logprobs.text_offset[:3] == [0, *accumulate(len(token) for token in logprobs.tokens[:2])]
    assert len(logprobs.tokens) == echoed.usage.total_tokens == len(logprobs.top_logprobs)
    scored = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=0, echo=True, logprobs=0)
    assert len(scored.choices[0].logprobs.token_logprobs) == 3
    assert scored.choices[0].finish_reason == "length"


def test_an_echo_is_the_prompt_as_it_was_given(client: openai.OpenAI) -> None:
    for prompt in ("<|im_start|>user  \n Hi<|im_end|>", [1, 40, 41, 2]):
        options: Any = {"model": "tiny", "prompt": prompt, "max_tokens": 3, "temperature": 0, "logprobs": 1}
        whole = client.completions.create(**options, echo=True).choices[0]
        said = client.completions.create(**options).choices[0]
        shown = prompt if isinstance(prompt, str) else "".join(whole.logprobs.tokens[:4])
        assert whole.text == shown + said.text
        assert "".join(whole.logprobs.tokens) == whole.text
        assert whole.logprobs.text_offset[-1] == len(shown) + said.logprobs.text_offset[-1]
        # the prompt's first token follows nothing; the answer's are as likely as without the echo
        assert whole.logprobs.token_logprobs[-3:] == pytest.approx(said.logprobs.token_logprobs, abs=1e-4)
        chunks = list(client.completions.create(**options, echo=True, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"suffix": "the end"}, "'suffix' is given, which this server does not do"),
        ({"best_of": 3}, "best_of"),
        ({"prompt": []}, "0 prompts were given"),
        ({"prompt": [[]]}, "The prompt is empty"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": [5, 320]}, "a token above 319"),
        ({"prompt": [5, -1]}, "prompt"),
        ({"prompt": [5] * 600}, "600 tokens; at most 511"),
        ({"max_tokens": 0}, "only makes sense with echo"),
    ],
)
def test_what_is_wrong_with_a_text_is_said(server: Server, changes: dict[str, Any], sentence: str) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "The fox", "max_tokens": 2} | changes)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]["message"]


def test_null_is_as_if_it_were_left_out(server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 5, "temperature": 0}
    nulls = dict.fromkeys(("n", "stream", "stop", "presence_penalty", "logprobs", "tools", "seed", "stream_options"))
    texts = [
        httpx.post(f"{server.url}/v1/chat/completions", json=given).json()["choices"] for given in (body, body | nulls)
    ]
    assert texts[0] == texts[1]


def test_a_search_is_asked_for_by_its_alpha(client: openai.OpenAI, server: Server) -> None:
    assistant = lory.load(server.catalogue.model.name_or_path)
    options = GenerationOptions(penalty_alpha=0.6, top_k=5, max_new_tokens=12)
    searched = ask(client, extra_body={"penalty_alpha": 0.6, "top_k": 5})
    assert searched.choices[0].message.content == assistant.chat(MESSAGES, options)
    assert searched.choices[0].message.content != ask(client).choices[0].message.content
    none = ask(client, extra_body={"penalty_alpha": 0, "top_k": 5})
    assert none.choices[0].message.content == ask(client).choices[0].message.content


def test_lines_of_a_stream_end_where_its_events_do() -> None:
    event = _write_event({"text": "\u2028\x85\r\n\x0b你"})
    assert event.isascii()
    assert event.decode().splitlines() == [event.decode().strip(), ""]


def test_a_biased_token_comes_always_or_never(client: openai.OpenAI) -> None:
    always = ask(client, logit_bias={"70": 100}, max_tokens=4, logprobs=True)
    assert len({token.token for token in always.choices[0].logprobs.content}) == 1
    frequent = ask(client, logit_bias={"70": 100}, max_tokens=4, logprobs=True, frequency_penalty=2)
    assert len(frequent.choices[0].logprobs.content) == 4


def test_tools_reach_the_template_or_are_refused(client: openai.OpenAI) -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError, match="does not tell the model of the tool 'look_up'"):
        ask(client, tools=tools)
    assert ask(client, tools=tools, tool_choice="none").choices


@pytest.mark.parametrize(
    ("changes", "status", "sentence"),
    [
        ({"model": "other"}, 404, "There is no model 'other'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "poet", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogate"),
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 100000}, 400, "at most 4096"),
        ({"n": 5}, 400, "at most 4"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"tempratur": 1}, 400, "'tempratur' is not a field"),
        ({"penalty_alpha": 0.6, "temperature": 1}, 400, "contrastive search, which draws nothing"),
        ({"penalty_alpha": 0.6, "n": 2}, 400, "contrastive search, which draws nothing"),
        ({"penalty_alpha": 0.6, "logprobs": True}, 400, "logprobs are not given for contrastive search"),
        ({"penalty_alpha": 0.6, "on_loop": "stop"}, 400, "takes no guard against loops"),
        ({"on_loop": "back_up"}, 400, "on_loop"),
        ({"penalty_alpha": 0.6, "top_k": 100}, 400, "over 1 to 64 tokens"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"top_logprobs": 2}, 400, "logprobs=true"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "tokens; at most 511"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
            400,
            "reads text only",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(server: Server, changes: dict[str, Any], status: int, sentence: str) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2} | changes
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == status
    error = answer.json()["error"]
    assert sentence in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"{", b"[" * 100_000, b'{"model": NaN}', b"\xff\xfe", b"null", b""])
def test_what_is_no_request_is_a_400(server: Server, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert "Traceback" not in answer.text


def test_paths_and_methods_that_are_not(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"] == "There is nothing at this path."
    assert httpx.get(f"{server.url}/v1/chat/completions").status_code == 405
    assert httpx.get(f"{server.url}/docs").status_code == 404
    headers = {"Content-Type": "application/json"}
    assert httpx.post(f"{server.url}/v1/adapters", content=b"{}", headers=headers).status_code == 404


def test_health_and_metrics(client: openai.OpenAI, server: Server) -> None:
    before = server.read_metric("lory_answer_tokens_total")
    count = ask(client).usage.completion_tokens
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert server.read_metric("lory_answer_tokens_total") == before + count
    assert server.read_metric("lory_first_token_seconds_count") > 0
    assert server.read_metric("lory_answer_repetition_count") > 0
    assert 'lory_requests_total{path="/v1/chat/completions",status="200"}' in httpx.get(f"{server.url}/metrics").text


def test_a_chat_goes_on_where_it_was_kept(client: openai.OpenAI, server: Server) -> None:
    first = ask(client, max_tokens=30).choices[0].message.content
    messages = [*MESSAGES, {"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    before = server.read_metric("lory_kept_tokens_total")
    kept = ask(client, messages=messages).choices[0].message.content
    assert server.read_metric("lory_kept_tokens_total") > before
    server.engine.call(lambda: setattr(server.engine._kept, "_texts", [])).result()
    assert ask(client, messages=messages).choices[0].message.content == kept
