"""The requests of OpenAI's API that are understood, checked; a field that would be left out in silence is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20


def _check_text(text: str) -> str:
    # half of a pair of surrogates, which JSON can write and no tokenizer can read
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text has half a surrogate pair, which is no character")
    return text


Text = Annotated[str, AfterValidator(_check_text)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Unused = Annotated[Any, Field(description="Taken, and without effect here.")]


class Request(BaseModel):
    """Base of all requests: unknown fields, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=(), frozen=True)


class TextPart(Request):
    """A part of a message that is text."""

    type: Literal["text"]
    text: Text


class ImageUrl(Request):
    """Where an image is."""

    url: Text
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Request):
    """A part of a message that is an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class FunctionCall(Request):
    """A function's name and its arguments, a JSON object."""

    name: Text
    arguments: Text


class ToolCallPart(Request):
    """A call in an assistant's message."""

    id: Text = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Request):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] | None = None
    name: Text | None = None
    tool_calls: list[ToolCallPart] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _check(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message without content is an assistant's with tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to an assistant's message")
        return self


class StreamOptions(Request):
    """What a stream brings along."""

    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingRequest(Request):
    """What requests for chats and for texts have in common."""

    model: Text | None = Field(None, description="The base's name or an adapter's; by default the base.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token always.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 are no limit.")
    min_p: float | None = Field(None, ge=0, le=1)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-(2**62), le=2**62)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, description="By token id.")
    penalty_alpha: float | None = Field(None, ge=0, le=1, description="Contrastive search over top_k tokens; 0: none.")
    on_loop: Literal["off", "report", "stop", "penalize"] | None = Field(
        None, description="What happens when the answer goes round in circles; stop ends it with the reason length."
    )
    user: Unused = None
    metadata: Unused = None
    store: Unused = None
    service_tier: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, values: Any) -> Any:
        # what some clients write for what they leave out, and OpenAI takes
        return (
            {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values
        )

    @model_validator(mode="after")
    def _check_common(self) -> SamplingRequest:
        if self.penalty_alpha and (self.temperature or self.n > 1):
            raise ValueError(
                "penalty_alpha is for contrastive search, which draws nothing; set temperature to 0, n to 1"
            )
        if self.penalty_alpha and self.on_loop not in (None, "off"):
            raise ValueError("contrastive search (penalty_alpha) takes no guard against loops; leave on_loop out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in given if stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ResponseFormat(Request):
    """What an answer looks like."""

    type: Literal["text"]


class ChatRequest(SamplingRequest):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Unused = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs=true")
        return self


class CompletionRequest(SamplingRequest):
    """``POST /v1/completions``."""

    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    suffix: None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class AdapterRequest(Request):
    """``POST /v1/adapters``."""

    name: str = Field(min_length=1, max_length=100, pattern=r"^[\w.:/-]+$")
    path: Text = Field(min_length=1, max_length=1000, description="A folder on the server, below one that is allowed.")
