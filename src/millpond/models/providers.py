"""Text models of providers, through pydantic-ai's model classes.

Opened by `models.open_text_model`. Invariant: one `complete` is one request; the SDKs' own retries
are off, by the client and again by each request's settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import httpx2
from openai import AsyncOpenAI
from openai.types import chat
from pydantic_ai.direct import model_request, model_request_stream
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    PartDeltaEvent,
    PartStartEvent,
    SystemPromptPart,
    TextPart,
    TextPartDelta,
    UserPromptPart,
)
from pydantic_ai.models import Model
from pydantic_ai.models.ollama import OllamaModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIStreamedResponse
from pydantic_ai.providers.ollama import OllamaProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider
from pydantic_ai.settings import ModelSettings

from millpond.errors import Transient
from millpond.models.port import Completion, FinishReason, Message, OnText, as_messages
from millpond.models.provider_errors import translated

OPENAI_URL = "https://api.openai.com/v1"
OLLAMA_URL = "http://127.0.0.1:11434/v1"
_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "content_filter": "content_filter",
    "tool_call": "tool_call",
    "error": "error",
}


class ProviderTextModel:
    """A text model of OpenAI (or any server that speaks its protocol), Anthropic, Google, Ollama."""

    def __init__(
        self, provider: str, name: str, base_url: str, api_key: str, *, timeout_s: float
    ) -> None:
        self.name = f"{provider}:{name}"
        self._timeout_s = timeout_s
        self._http = open_http(timeout_s)
        self._model = _open(provider, name, base_url, api_key, self._http)

    async def complete(
        self,
        messages: str | Sequence[Message],
        *,
        max_tokens: int = 512,
        temperature: float | None = None,
        on_text: OnText | None = None,
    ) -> Completion:
        """Write the next message; see `TextModel`. An answer without a finish reason is Transient."""
        settings = ModelSettings(
            max_tokens=max_tokens, max_retries=0, request_timeout=self._timeout_s
        )
        if temperature is not None:
            settings["temperature"] = temperature
        history = _history(as_messages(messages))
        with translated(self.name):
            if on_text is None:
                response = await model_request(self._model, history, model_settings=settings)
            else:
                response = await self._stream(history, settings, on_text)
        return self._completion(response)

    async def _stream(
        self, history: Sequence[ModelMessage], settings: ModelSettings, on_text: OnText
    ) -> ModelResponse:
        """Ask for the answer as it is written; returns the whole of it."""
        async with model_request_stream(self._model, history, model_settings=settings) as stream:
            async for event in stream:
                if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart):
                    on_text(event.part.content)
                elif isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
                    on_text(event.delta.content_delta)
            return stream.get()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def _completion(self, response: ModelResponse) -> Completion:
        finish = _FINISH.get(response.finish_reason or "")
        if finish is None or finish == "error":
            raise _unfinished(self.name)
        return Completion(
            text="".join(part.content for part in response.parts if isinstance(part, TextPart)),
            model=self.name,
            input_tokens=response.usage.input_tokens,
            output_tokens=response.usage.output_tokens,
            finish_reason=finish,
        )


class _StrictStream(OpenAIStreamedResponse):
    """A stream that ends without a finish reason was cut off, and is not taken for whole."""

    def _missing_finish_reason(self) -> NoReturn:
        raise _unfinished(self.model_name)


class _StrictChatModel(OpenAIChatModel):
    """OpenAI's chat protocol, where a missing finish reason stays missing instead of being `stop`."""

    @property
    def _streamed_response_cls(self) -> type[OpenAIStreamedResponse]:
        return _StrictStream

    def _process_response(
        self, response: chat.ChatCompletion | str, **options: Any
    ) -> ModelResponse:
        _refuse_unfinished(response, self.model_name)
        return super()._process_response(response, **options)


class _StrictOllamaModel(OllamaModel):
    """Ollama's chat protocol, as strict about the finish reason."""

    @property
    def _streamed_response_cls(self) -> type[OpenAIStreamedResponse]:
        return _StrictStream

    def _process_response(
        self, response: chat.ChatCompletion | str, **options: Any
    ) -> ModelResponse:
        _refuse_unfinished(response, self.model_name)
        return super()._process_response(response, **options)


def _refuse_unfinished(response: chat.ChatCompletion | str, name: str) -> None:
    if isinstance(response, str) or not response.choices or not response.choices[0].finish_reason:
        raise _unfinished(name)


def _unfinished(name: str) -> Transient:
    return Transient(
        f"{name} gave an answer without a finish reason: it was cut off.", code="model_cut_off"
    )


def open_http(timeout_s: float) -> httpx2.AsyncClient:
    """Open the HTTP client of one model: 10 s to connect, `timeout_s` between bytes."""
    return httpx2.AsyncClient(timeout=httpx2.Timeout(timeout_s, connect=10.0))


def open_openai_client(base_url: str, api_key: str, http: httpx2.AsyncClient) -> AsyncOpenAI:
    """Open an OpenAI client without retries; a server that needs no key gets a word in its place."""
    return AsyncOpenAI(
        base_url=base_url, api_key=api_key or "not-needed", http_client=http, max_retries=0
    )


def _open(
    provider: str, name: str, base_url: str, api_key: str, http: httpx2.AsyncClient
) -> Model[Any]:
    if provider == "anthropic":
        return _open_anthropic(name, base_url, api_key, http)
    if provider == "google":
        return _open_google(name, base_url, api_key, http)
    if provider == "ollama":
        client = open_openai_client(base_url or OLLAMA_URL, api_key, http)
        return _StrictOllamaModel(name, provider=OllamaProvider(openai_client=client))
    client = open_openai_client(base_url or OPENAI_URL, api_key, http)
    if base_url:
        return _StrictChatModel(
            name, provider=OpenAICompatibleProvider("openai-compatible", openai_client=client)
        )
    return _StrictChatModel(name, provider=OpenAIProvider(openai_client=client))


def _open_anthropic(name: str, base_url: str, api_key: str, http: httpx2.AsyncClient) -> Model[Any]:
    from anthropic import AsyncAnthropic
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.providers.anthropic import AnthropicProvider

    client = AsyncAnthropic(
        api_key=api_key or "not-needed", base_url=base_url or None, http_client=http, max_retries=0
    )
    return AnthropicModel(name, provider=AnthropicProvider(anthropic_client=client))


def _open_google(name: str, base_url: str, api_key: str, http: httpx2.AsyncClient) -> Model[Any]:
    from pydantic_ai.models.google import GoogleModel
    from pydantic_ai.providers.google import GoogleProvider

    provider = GoogleProvider(
        api_key=api_key or "not-needed", http_client=http, base_url=base_url or None
    )
    return GoogleModel(name, provider=provider)


def _history(messages: Sequence[Message]) -> list[ModelMessage]:
    history: list[ModelMessage] = []
    for message in messages:
        if message.role == "assistant":
            history.append(ModelResponse(parts=[TextPart(message.content)]))
        elif message.role == "system":
            history.append(ModelRequest(parts=[SystemPromptPart(message.content)]))
        else:
            history.append(ModelRequest(parts=[UserPromptPart(message.content)]))
    return history
