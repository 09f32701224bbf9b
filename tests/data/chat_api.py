"""A chat API on loopback that writes instructions and answers, and misbehaves as it is told."""

from __future__ import annotations

import hashlib
import http.server
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_WORDS = (
    "amber anchor apple arrow autumn badge bamboo basin beacon birch bottle branch bridge bronze button cabin candle "
    "canyon carpet castle cedar circle cloud clover copper coral cradle crystal desert dragon ember engine feather "
    "ferry fiddle forest fossil garden ginger glacier hammer harbor hazel helmet honey island ivory jacket jungle "
    "kettle ladder lantern lemon lizard magnet maple marble meadow mirror needle nickel oasis orchard otter oyster "
    "paddle pepper pigeon planet pocket quarry rabbit ribbon river rocket saddle salmon shadow silver spider spruce "
    "summer tablet temple thunder timber tunnel turtle velvet violin walnut willow window winter yellow zebra"
)


@dataclass
class ChatApi:
    """What the server does, and what it was asked."""

    write: Callable[[str], str] = lambda prompt: write_reply(prompt)
    """The reply to the last message."""
    faults: list[tuple[int, dict[str, str], bytes] | str] = field(default_factory=list)
    """What the next calls get instead: status, headers and body, or "hang up"."""
    finish_reason: str = "stop"
    key: str = ""
    """The only key that is accepted; empty: any."""
    asked: list[list[dict[str, str]]] = field(default_factory=list)
    """The messages of each call, those with a fault, too."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    """How often each last message was answered well."""
    on_answer: Callable[[int], None] = lambda count: None
    """Called before each good answer with how many there were."""
    most_at_once: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    _open: int = 0

    def questions(self) -> list[str]:
        """The instructions that were asked to be answered."""
        return [messages[-1]["content"] for messages in self.asked if not is_prompt(messages[-1]["content"])]


def is_prompt(text: str) -> bool:
    """Whether instructions are asked for."""
    return "Reply with a JSON list" in text


def write_reply(prompt: str) -> str:
    """Eight new instructions, or an answer; always the same for the same prompt."""
    if not is_prompt(prompt):
        return f"I looked into it: {' '.join(write_words(prompt, 6))}."
    return json.dumps([write_instruction(f"{prompt} {number}") for number in range(8)])


def write_instruction(seed: str) -> str:
    return f"Describe {' '.join(write_words(seed, 5))}."


def write_words(seed: str, count: int) -> list[str]:
    return random.Random(hashlib.sha256(seed.encode()).hexdigest()).sample(_WORDS.split(), count)


def shown_examples(prompt: str) -> list[str]:
    """The instructions that a prompt shows."""
    found: list[str] = json.loads(prompt[prompt.index("[") : prompt.index("]") + 1])
    return found


def completion(text: str, finish_reason: str = "stop") -> bytes:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choices = [{"index": 0, "message": message, "finish_reason": finish_reason}]
    return json.dumps({"id": "1", "object": "chat.completion", "choices": choices, "usage": usage}).encode()


class _Handler(http.server.BaseHTTPRequestHandler):
    api: ChatApi
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        api, body = self.api, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with api.lock:
            api.asked.append(body["messages"])
            api.bodies.append(body)
            fault = api.faults.pop(0) if api.faults else None
            api._open += 1
            api.most_at_once = max(api.most_at_once, api._open)
        try:
            self._answer(prompt, fault)
        finally:
            with api.lock:
                api._open -= 1

    def _answer(self, prompt: str, fault: tuple[int, dict[str, str], bytes] | str | None) -> None:
        api = self.api
        if isinstance(fault, str):
            self.close_connection = True
            self.connection.close()
        elif fault:
            self._send(*fault)
        elif api.key and self.headers["Authorization"] != f"Bearer {api.key}":
            said = f"Incorrect API key provided: {self.headers['Authorization']}"
            self._send(401, {}, json.dumps({"error": {"message": said}}).encode())
        elif not re.fullmatch("/v1/chat/completions", self.path):
            self._send(404, {}, b"no such page")
        else:
            with api.lock:
                api.on_answer(sum(api.answered.values()))
                api.answered[prompt] += 1
            self._send(200, {}, completion(api.write(prompt), api.finish_reason))

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that goes away in the middle is expected."""


@contextmanager
def serve() -> Iterator[ChatApi]:
    """An API on a free port while the block runs."""
    api = ChatApi()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": api}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    api.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
