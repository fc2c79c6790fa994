"""The port to models: what a text model and an embedder look like to the rest of the house.

Implemented by `providers` and by the local models; used by registered steps, `knowledge` and the
CLI. Invariant: an implementation tries once; whoever calls (the engine's steps) decides on retries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

OnText = Callable[[str], None]
Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "content_filter", "tool_call", "error"]


class Message(BaseModel):
    """One message of a conversation with a text model."""

    model_config = ConfigDict(frozen=True)

    role: Role
    content: str


class Completion(BaseModel):
    """What a text model wrote, by which model, and what it used.

    `finish_reason` `length` means that the text was cut at `max_tokens`.
    """

    model_config = ConfigDict(frozen=True)

    text: str
    model: str
    input_tokens: int
    output_tokens: int
    finish_reason: FinishReason


@runtime_checkable
class TextModel(Protocol):
    """A model that writes text."""

    @property
    def name(self) -> str:
        """The model as `provider:name`."""
        ...

    async def complete(
        self,
        messages: str | Sequence[Message],
        *,
        max_tokens: int = 512,
        temperature: float | None = None,
        on_text: OnText | None = None,
    ) -> Completion:
        """Write the next message; a plain text stands for one user message.

        With `on_text` the words are asked for as they come and passed to it; the completion has all of them.
        Raises Transient (rate limited, unreachable, timed out, answer cut off in transit) or
        Permanent (refused: key, model name, context length, malformed request).
        """
        ...

    async def close(self) -> None:
        """Give back connections and processes; the model is not used afterwards."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """A model that turns texts into vectors of length 1, closer for closer meanings."""

    @property
    def name(self) -> str:
        """The model as `provider:name`; vectors of two names are never compared."""
        ...

    @property
    def dimensions(self) -> int:
        """The length of each vector."""
        ...

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return one vector per text, in order; raises like `TextModel.complete`."""
        ...

    async def close(self) -> None:
        """Give back connections and memory; the embedder is not used afterwards."""
        ...


def as_messages(messages: str | Sequence[Message]) -> list[Message]:
    """Return a conversation; a plain text becomes one user message."""
    if isinstance(messages, str):
        return [Message(role="user", content=messages)]
    return list(messages)
