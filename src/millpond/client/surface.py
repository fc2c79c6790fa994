"""The surface: makes methods of calls, the same ones for the sync and the async client.

Called by the class bodies of `handles` and `groups`. Invariant: a method takes exactly what its call
takes, and gives what the call gives, at once or to be awaited as its group's client is `Now` or `Later`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Generic, ParamSpec, Protocol, Self, TypeVar, overload

from millpond.client.call import Call
from millpond.client.models import Page

P = ParamSpec("P")
T = TypeVar("T")


class Now:
    """The kind of a client that waits for answers."""


class Later:
    """The kind of a client whose answers are awaited."""


Kind = TypeVar("Kind", Now, Later)


class Sends(Protocol):
    """A client, whichever its kind: each gives its result or what is to be awaited for it."""

    def send(self, call: Call[Any]) -> Any:
        """Do a call."""
        ...

    def pages(self, call: Call[Page[Any]]) -> Any:
        """Iterate over every item of a list, page after page."""
        ...

    def handle(self, call: Call[Any]) -> Any:
        """Do a call that tells of a run, and give a handle of that run."""
        ...


class Group(Generic[Kind]):
    """Calls of one kind of thing."""

    def __init__(self, client: Sends) -> None:
        self._client: Any = client


class Made:
    """What makes a method of a call when it is looked up on a group."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self.build = build
        self.__doc__ = build.__doc__

    def __get__(self, group: Any, owner: type) -> Any:
        if group is None:
            return self

        def do(*args: Any, **kwargs: Any) -> Any:
            return self.do(group, *args, **kwargs)

        do.__doc__ = self.__doc__
        return do

    def do(self, group: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Do the call for a group."""
        return group._client.send(self.build(*args, **kwargs))


class method(Made, Generic[P, T]):  # noqa: N801 - reads as a decorator does
    """A method that does a call."""

    def __init__(self, build: Callable[P, Call[T]]) -> None:
        super().__init__(build)

    @overload
    def __get__(self, group: None, owner: type) -> Self: ...

    @overload
    def __get__(self, group: Group[Now], owner: type) -> Callable[P, T]: ...

    @overload
    def __get__(self, group: Group[Later], owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...

    def __get__(self, group: Any, owner: type) -> Any:
        return super().__get__(group, owner)


class listing(Made, Generic[P, T]):  # noqa: N801 - reads as a decorator does
    """A method that iterates over a whole list, of which its call gives a page."""

    def __init__(self, build: Callable[P, Call[Page[T]]]) -> None:
        super().__init__(build)

    @overload
    def __get__(self, group: None, owner: type) -> Self: ...

    @overload
    def __get__(self, group: Group[Now], owner: type) -> Callable[P, Iterator[T]]: ...

    @overload
    def __get__(self, group: Group[Later], owner: type) -> Callable[P, AsyncIterator[T]]: ...

    def __get__(self, group: Any, owner: type) -> Any:
        return super().__get__(group, owner)

    def do(self, group: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Iterate over the list that the call begins."""
        return group._client.pages(self.build(*args, **kwargs))
