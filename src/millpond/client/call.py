"""A call: one thing that can be asked of the server, as a value, without doing it.

Made by the functions of `calls`, sent by the transports of both clients. Invariant: what could do
something twice is repeatable only under an idempotency key, which such a call carries by itself.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from functools import cache
from typing import Any, Final, Generic, Literal, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter

from millpond.client.models import Page

T = TypeVar("T")
Id = str | uuid.UUID


class Unset(Enum):
    """What stands for an argument that was left out where None means null."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


@dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """One request; `read` makes the result of the decoded JSON that answers it.

    `is_text` says that the answer is no JSON: `read` gets its text. `is_same_twice` says that a second time
    changes nothing more than the first, though it is no GET and carries no key.
    """

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    read: Callable[[Any], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    content: bytes | None = None
    idempotency_key: str | None = None
    is_same_twice: bool = False
    is_text: bool = False

    @property
    def is_repeatable(self) -> bool:
        """Whether it may be sent again when nobody knows what became of it."""
        return self.method == "GET" or self.idempotency_key is not None or self.is_same_twice


@cache
def reader(kind: Any) -> Callable[[Any], Any]:
    """Return what validates decoded JSON as a type."""
    return TypeAdapter(kind).validate_python


def read_nothing(document: Any) -> None:
    """Read an answer that has no body."""


def read_text(text: str) -> str:
    """Read an answer that is no JSON."""
    return text


def get(path: str, kind: Any, /, **params: Any) -> Call[Any]:
    """Make a call that reads; parameters that are None are left out."""
    return Call(method="GET", path=path, read=reader(kind), params=given(params))


def post(path: str, kind: Any, body: Any = None) -> Call[Any]:
    """Make a call that is sent once, and again only when the server says that it did nothing."""
    return Call(method="POST", path=path, read=reader(kind), body=body)


def post_once(path: str, kind: Any, body: Any = None, *, key: str | None) -> Call[Any]:
    """Make a call under an idempotency key, one of its own if none is given."""
    return replace(post(path, kind, body), idempotency_key=key or new_key())


def path_of(*parts: object) -> str:
    """Return a path of the API, its parts quoted: a name may hold any character."""
    return "/v1/" + "/".join(quote(str(part), safe="") for part in parts)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is None, so that the server's own default holds."""
    return {name: value for name, value in values.items() if value is not None}


def set_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is unset; None stays and means null."""
    return {name: value for name, value in values.items() if value is not UNSET}


def next_page(call: Call[Page[T]], page: Page[T]) -> Call[Page[T]]:
    """Return the call for the page after this one, in the direction of the call."""
    if "before" in call.params:
        return replace(call, params={**call.params, "before": page.first_id})
    return replace(call, params={**call.params, "after": page.last_id})


def new_key() -> str:
    """Make an idempotency key."""
    return uuid.uuid4().hex


def time_text(at: datetime | None) -> str | None:
    """Return a time as the API reads it."""
    return None if at is None else at.isoformat()


def id_text(value: Id | None) -> str | None:
    """Return an id as the API reads it."""
    return None if value is None else str(value)


def many(values: str | Sequence[str] | None) -> list[str] | None:
    """Return one or several as a list."""
    return None if values is None else [values] if isinstance(values, str) else list(values)
