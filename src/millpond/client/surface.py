"""The surface: makes methods of calls, so that both clients have the same ones by construction.

Called by the two clients' class bodies. Invariant: a method takes exactly what its call takes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

from millpond.client.calls import Call

P = ParamSpec("P")
T = TypeVar("T")


class Sends(Protocol):
    """A group of a sync client."""

    def send(self, call: Call[T]) -> T:
        """Do a call."""
        ...


class SendsLater(Protocol):
    """A group of an async client."""

    async def send(self, call: Call[T]) -> T:
        """Do a call."""
        ...


class method(Generic[P, T]):  # noqa: N801 - reads as a decorator does
    """A sync method that does a call."""

    def __init__(self, build: Callable[P, Call[T]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(self, group: None, owner: type) -> method[P, T]: ...

    @overload
    def __get__(self, group: Sends, owner: type) -> Callable[P, T]: ...

    def __get__(self, group: Any, owner: type) -> Any:
        if group is None:
            return self

        def do(*args: P.args, **kwargs: P.kwargs) -> T:
            result: T = group.send(self._build(*args, **kwargs))
            return result

        do.__doc__ = self.__doc__
        return do


class async_method(Generic[P, T]):  # noqa: N801 - reads as a decorator does
    """An async method that does a call."""

    def __init__(self, build: Callable[P, Call[T]]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    @overload
    def __get__(self, group: None, owner: type) -> async_method[P, T]: ...

    @overload
    def __get__(self, group: SendsLater, owner: type) -> Callable[P, Awaitable[T]]: ...

    def __get__(self, group: Any, owner: type) -> Any:
        if group is None:
            return self

        async def do(*args: P.args, **kwargs: P.kwargs) -> T:
            result: T = await group.send(self._build(*args, **kwargs))
            return result

        do.__doc__ = self.__doc__
        return do
