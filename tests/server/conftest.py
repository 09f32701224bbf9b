"""Servers on loopback in threads of the test's own process, over models that are loaded once."""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from lory.server.app import Service, build_app
from lory.server.catalogue import Catalogue, open_catalogue
from lory.server.engine import Engine
from lory.server.limits import Limits
from lory.server.metrics import ServerMetrics
from lory.server.run import GracefulServer
from lory.server.runner import Runner


@dataclass
class Server:
    """A running server."""

    url: str
    engine: Engine
    catalogue: Catalogue
    process: GracefulServer
    thread: threading.Thread

    def read_metric(self, name: str) -> float:
        """The value of a metric without labels."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


@contextlib.contextmanager
def running(
    opened: tuple[Catalogue, Runner],
    limits: Limits,
    key: str = "",
    folders: tuple[Path, ...] = (),
    step_seconds: float = 0.0,
) -> Iterator[Server]:
    """A server over an opened model; the next one may have the model afterwards.

    Args:
        step_seconds: the least time that a step takes, since the tiny model's take none.
    """
    catalogue, runner = opened[0], copy.copy(opened[1])
    runner.clear()
    step = runner.step

    def pace(tokens: Sequence[int]) -> torch.Tensor:
        time.sleep(step_seconds)
        return step(tokens)

    if step_seconds:
        runner.__dict__["step"] = pace
    engine = Engine(runner, limits, ServerMetrics())
    app = build_app(Service(catalogue, engine, folders), key, ("127.0.0.1",))
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    ports: queue.Queue[int] = queue.Queue()
    server = GracefulServer(config, engine, ports.put)
    thread = threading.Thread(target=server.run)
    engine.start()
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{ports.get(timeout=10)}", engine, catalogue, server, thread)
    finally:
        server.should_exit = True
        thread.join()
        engine.close()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def make_adapter(model: Path, folder: Path, seed: int, rank: int = 3, **settings: Any) -> Path:
    """A random adapter, large enough to change every answer."""
    from transformers import AutoModelForCausalLM

    from lory.adapters.files import save_adapter
    from lory.adapters.inject import AdapterConfig, adapted_layers, attach_lora

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    attach_lora(base, AdapterConfig(rank=rank, alpha=7, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapted_layers(base):
            layer.lora_A.normal_(std=0.3, generator=generator)
            layer.lora_B.normal_(std=0.3, generator=generator)
    folder.mkdir(parents=True)
    save_adapter(base, folder, str(model))
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, which wait for one another where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Names and folders of three adapters on the tiny model, of several ranks and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": str(make_adapter(tiny_model, folder / "one", 1)),
        "two": str(make_adapter(tiny_model, folder / "two", 2, rank=5, targets=["q_proj", "down_proj"])),
        "three": str(make_adapter(tiny_model, folder / "three", 3, targets=["v_proj", "lm_head"])),
    }


@pytest.fixture(scope="session")
def opened(tiny_model: Path, adapters: dict[str, str]) -> tuple[Catalogue, Runner]:
    """The tiny model with the three adapters, for one server at a time."""
    return open_catalogue(str(tiny_model), adapters, "tiny", places=9, changes=True)


@pytest.fixture(scope="session")
def serve(opened: tuple[Catalogue, Runner]) -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """A function that runs a server over the tiny model: `serve(max_batch=2)`."""

    def start(key: str = "", step_seconds: float = 0.0, **limits: Any) -> contextlib.AbstractContextManager[Server]:
        return running(opened, Limits(**limits), key, step_seconds=step_seconds)

    return start


@pytest.fixture(scope="module")
def server(serve: Callable[..., contextlib.AbstractContextManager[Server]]) -> Iterator[Server]:
    """A server over the tiny model for the tests of one file."""
    with serve(max_batch=4) as started:
        yield started
