"""The HTTP side of the server: OpenAI's paths, health and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from lory.runtime import UsageError, log
from lory.server.catalogue import Catalogue, Served
from lory.server.engine import Engine, Refused
from lory.server.errors import ApiError, ErrorAnswer, explain_validation
from lory.server.exchange import Exchange, ReplyResponse
from lory.server.guard import Guard
from lory.server.prompts import list_images, read_chat, read_completion
from lory.server.replies import ChatReply, TextReply
from lory.server.schema import AdapterRequest, ChatRequest, CompletionRequest
from lory.server.vision import ImageDesk

T = TypeVar("T")

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 403, 404, 405, 408, 413, 429, 500, 503)
}


class Service:
    """What the paths work with.

    Args:
        adapter_folders: adapters may be added from below these.
    """

    def __init__(self, catalogue: Catalogue, engine: Engine, adapter_folders: Sequence[Path] = ()) -> None:
        self.catalogue, self.engine = catalogue, engine
        self.adapter_folders = [folder.resolve() for folder in adapter_folders]
        # beside the loop, which long prompts must not stop; one thread, since a tokenizer is not for several
        self._reader = ThreadPoolExecutor(1, "lory-prompts")
        self._desk = ImageDesk(engine.limits)

    async def read(self, function: Callable[[], T]) -> T:
        """Run what takes a while beside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, function)

    def find(self, name: str | None) -> Served:
        """The model of this name.

        Raises:
            ApiError: there is none.
        """
        served = self.catalogue.find(name)
        if served is None:
            shown = (name or "").encode("utf-8", "replace").decode()[:100]
            raise ApiError(404, f"There is no model '{shown}'; see /v1/models.", "model", "model_not_found")
        return served

    async def chat(self, request: ChatRequest) -> Response:
        """Answer a conversation."""
        served, exchange = self.find(request.model), Exchange(self.engine)
        limits, deliver = self.engine.limits, exchange.deliver_to(0)
        sources = list_images(request.messages)
        seen = await self._desk.see(sources, served.reader) if sources and served.reader is not None else None
        job = await self.read(lambda: read_chat(request, served, limits, deliver, seen))
        reply = ChatReply(served.name, [job], served.tokenizer)
        exchange.submit([job])
        return ReplyResponse(exchange, reply, request.stream, request.wants_usage)

    async def complete(self, request: CompletionRequest) -> Response:
        """Continue texts."""
        served, exchange = self.find(request.model), Exchange(self.engine)
        limits = self.engine.limits
        jobs = await self.read(lambda: read_completion(request, served, limits, exchange.deliver_to))
        reply = TextReply(served.name, jobs, served.tokenizer, request.prompts if request.echo else None)
        exchange.submit(jobs)
        return ReplyResponse(exchange, reply, request.stream, request.wants_usage)

    async def add_adapter(self, request: AdapterRequest) -> Served:
        """Put an adapter beside the others."""
        if "\0" in request.path:
            # which pathlib raises at
            raise ApiError(400, "The path has a NUL character, which no path can have.", "path")
        folder = (self.adapter_folders[0] / request.path).resolve()
        if not any(folder.is_relative_to(allowed) for allowed in self.adapter_folders):
            # the same whether it exists or not: nothing is told of other folders
            raise ApiError(400, "The path is not below a folder that adapters may come from.", "path")
        catalogue, most = self.catalogue, self.engine.limits.adapters
        if len(catalogue.list()) > most:
            raise ApiError(400, f"There are {most} adapters already, the most that are taken; remove one.", "name")
        try:
            adapter, parts = await self.read(lambda: catalogue.read(request.name, folder))
            number, bank = catalogue.next_number(), catalogue.bank
            assert bank is not None
            await asyncio.wrap_future(self.engine.call(lambda: bank.add(number, adapter)))
            try:
                return await self.read(lambda: catalogue.add(request.name, number, parts))
            except UsageError:
                self.engine.retire(number)
                raise
        except UsageError as error:
            raise ApiError(400, str(error)) from error

    def remove_adapter(self, name: str) -> None:
        """Serve an adapter no longer; its running answers are finished."""
        served = self.catalogue.remove(name)
        if served is None or served.adapter is None:
            raise ApiError(404, "There is no adapter of this name.", "name", "model_not_found")
        self.engine.retire(served.adapter)


def build_app(service: Service, key: str = "", hosts: Collection[str] | None = None) -> FastAPI:
    """The ASGI app.

    Args:
        key: the API key that requests need; empty: none.
        hosts: names that requests may call the server by; None: any.
    """
    # no docs pages: theirs load scripts from elsewhere
    app = FastAPI(title="lory", version=version("lory-llm"), docs_url=None, redoc_url=None, responses=_ERRORS)
    _add_handlers(app)
    _add_paths(app, service)
    if service.adapter_folders:
        _add_adapter_paths(app, service)
    metrics, limits = service.engine.metrics, service.engine.limits
    app.add_middleware(Guard, metrics=metrics, key=key, hosts=hosts, limits=limits)
    describe = app.openapi

    def describe_without_422() -> dict[str, Any]:
        schema = describe()
        for operations in schema["paths"].values():
            for operation in operations.values():
                # what FastAPI says of validation; here it is a 400
                operation["responses"].pop("422", None)
        return schema

    app.openapi = describe_without_422  # type: ignore[method-assign]
    return app


def _add_handlers(app: FastAPI) -> None:
    def answer(error: ApiError) -> Response:
        return JSONResponse(error.to_dict(), error.status, error.headers)

    async def explain_api(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return answer(error)

    async def explain_refusal(request: Request, error: Exception) -> Response:
        return answer(ApiError(error.status if isinstance(error, Refused) else 400, str(error)))

    async def explain_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(explain_validation(list(error.errors())))

    async def explain_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        messages = {404: "There is nothing at this path.", 405: "This path does not take this method."}
        api_error = ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))
        return JSONResponse(api_error.to_dict(), error.status_code, {**(error.headers or {}), **api_error.headers})

    async def explain_failure(request: Request, error: Exception) -> Response:
        log.error("A request failed.", exc_info=error)
        return answer(ApiError(500, "The server failed; its log says how."))

    app.add_exception_handler(ApiError, explain_api)
    app.add_exception_handler(Refused, explain_refusal)
    app.add_exception_handler(UsageError, explain_refusal)
    app.add_exception_handler(RequestValidationError, explain_invalid)
    app.add_exception_handler(HTTPException, explain_http)
    app.add_exception_handler(Exception, explain_failure)


def _describe(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": served.created, "owned_by": "lory"}


def _add_paths(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest) -> Response:
        return await service.chat(request)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> Response:
        return await service.complete(request)

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe(served) for served in service.catalogue.list()]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> dict[str, Any]:
        return _describe(service.find(name))

    @app.get("/health")
    async def health() -> Response:
        status = "ok" if engine.is_healthy else "stopping"
        return JSONResponse({"status": status}, 200 if engine.is_healthy else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_adapter_paths(app: FastAPI, service: Service) -> None:
    @app.post("/v1/adapters")
    async def add_adapter(request: AdapterRequest) -> dict[str, Any]:
        return _describe(await service.add_adapter(request))

    @app.delete("/v1/adapters/{name:path}")
    async def remove_adapter(name: str) -> dict[str, Any]:
        service.remove_adapter(name)
        return {"id": name, "object": "model", "deleted": True}
