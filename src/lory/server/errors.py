"""Errors as OpenAI's API writes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lory.runtime import LoryError

RETRY_SECONDS = 5
"""What a client is told to wait for when the server is full."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
_CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "queue_full", 503: "unavailable"}


class ApiError(LoryError):
    """What a client is answered: an HTTP status and a sentence.

    Args:
        param: the field of the request that it is about.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's form."""
        return {
            "error": {
                "message": str(self),
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code or _CODES.get(self.status),
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that belong to it."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_SECONDS)} if self.status in (429, 503) else {}


class ErrorBody(BaseModel):
    """What stands in an answer that is an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An answer that is an error."""

    error: ErrorBody


def explain_validation(errors: list[ErrorDetails] | ValidationError) -> ApiError:
    """The first thing that is wrong with a request's body; what was given is not repeated, since it may be anything."""
    details = errors.errors(include_input=False, include_url=False) if isinstance(errors, ValidationError) else errors
    first = details[0]
    # "body" and the branches of unions are not the client's
    path = [str(part) for part in first["loc"] if part != "body" and not str(part).startswith(("function-", "list["))]
    name = ".".join(path)[:100].encode("utf-8", "replace").decode()
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"'{name}' is not a field that this server knows.", name, "unknown_parameter")
    if first["type"] == "none_required":
        return ApiError(400, f"'{name}' is given, which this server does not do; leave it out.", name)
    if first["type"] == "missing":
        return ApiError(400, f"'{name}' is missing." if name else "The body is missing.", name or None)
    message = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    return ApiError(400, f"'{name}': {message}." if name else f"{message}.", name or None)
