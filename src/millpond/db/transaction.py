"""Transactions: blocks on a lent connection that begin with one message and end with their block.

Made by `pool`. Invariants: a block that raises is rolled back, and its connection discarded when it was
cancelled; the probe, where there is one, hears of every commit just before it is sent and just after it
was acknowledged.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeAlias

from millpond.db.lending import Connection, Lending, Lent, is_broken, is_rolled_back
from millpond.db.translate import in_our_words
from millpond.errors import Permanent

# Called with `before:NAME` and `after:NAME` of each commit; crash tests end the process in it.
Probe: TypeAlias = Callable[[str], Awaitable[None]]


class Transaction:
    """One transaction, begun by `begin`, a message that may also set what holds until its end."""

    __slots__ = ("_begin", "_con", "_is_engine", "_lending", "_name", "_probe")
    _con: Lent

    def __init__(
        self, lending: Lending, probe: Probe | None, *, name: str, begin: str, is_engine: bool
    ) -> None:
        self._lending = lending
        self._probe = probe
        self._name = name
        self._begin = begin
        self._is_engine = is_engine

    async def __aenter__(self) -> Connection:
        con = self._lending.at_hand(self._name) or await self._lending.lend(self._name)
        try:
            await con.execute(self._begin)
        except BaseException as error:
            await _give_up(self._lending, con, error)
            if (ours := in_our_words(error, connecting=True)) is error:
                raise
            raise ours from error
        self._con = con
        return con

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            return await self._commit()
        await _give_up(self._lending, self._con, error)
        # The engine's blocks do nothing but talk to the database: a timeout in one is its.
        if (ours := in_our_words(error, connecting=self._is_engine)) is not error:
            raise ours from error
        return None

    async def _commit(self) -> None:
        con, probe = self._con, self._probe
        try:
            if probe is not None:
                await probe(f"before:{self._name}")
            is_over = await self._end()
            if probe is not None:
                await probe(f"after:{self._name}")
        except BaseException as error:
            await _give_up(self._lending, con, error)
            if (ours := in_our_words(error, connecting=True)) is error:
                raise
            raise ours from error
        if is_over:
            await self._lending.take_back(con, self._name, is_clean=True)

    async def _end(self) -> bool:
        """Commit; returns whether the connection is free for others then."""
        _refuse_rolled_back(await self._con.execute("commit"))
        return True


class Chain(Transaction):
    """Transactions of one duty after one another; one that follows at once begins with the commit of the last.

    That is a message less between them. A block says so by `follow`; then the connection stays lent, in a transaction
    in which nothing was done, until the next block or `close`.
    """

    __slots__ = ("_follows", "_is_open")

    def __init__(
        self, lending: Lending, probe: Probe | None, *, name: str, begin: str, is_engine: bool
    ) -> None:
        super().__init__(lending, probe, name=name, begin=begin, is_engine=is_engine)
        self._follows = self._is_open = False

    def follow(self) -> None:
        """Begin the next transaction with the commit of this one."""
        self._follows = True

    async def __aenter__(self) -> Connection:
        self._follows = False
        if self._is_open:
            self._is_open = False
            if not is_broken(self._con):
                return self._con
            await self._lending.take_back(self._con, is_clean=False)
        return await super().__aenter__()

    async def close(self) -> None:
        """Give the connection back, if the last block was to be followed."""
        if self._is_open:
            self._is_open = False
            is_clean = False
            try:
                is_clean = await is_rolled_back(self._con)
            finally:
                await self._lending.take_back(self._con, self._name, is_clean=is_clean)

    async def _commit(self) -> None:
        try:
            await super()._commit()
        except BaseException:
            self._is_open = False  # its connection is given back
            raise

    async def _end(self) -> bool:
        if not self._follows:
            return await super()._end()
        # After an error that somebody swallowed this statement is refused, before the commit could roll back.
        await self._con.execute(f"select; commit; {self._begin}")
        self._is_open = True
        return False


class Statement:
    """A block of one statement, which is a durable transaction by itself."""

    __slots__ = ("_con", "_lending", "_name", "_probe")
    _con: Lent

    def __init__(self, lending: Lending, probe: Probe | None, *, name: str) -> None:
        self._lending = lending
        self._probe = probe
        self._name = name

    async def __aenter__(self) -> Connection:
        con = self._lending.at_hand(self._name) or await self._lending.lend(self._name)
        self._con = con
        if self._probe is not None:
            await self._tell("before")
        return con

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            await _give_up(self._lending, self._con, error)
            if (ours := in_our_words(error, connecting=True)) is not error:
                raise ours from error
            return
        if self._probe is not None:
            await self._tell("after")
        await self._lending.take_back(self._con, self._name, is_clean=True)

    async def _tell(self, when: str) -> None:
        assert self._probe is not None
        try:
            await self._probe(f"{when}:{self._name}")
        except BaseException as error:
            await _give_up(self._lending, self._con, error)
            raise


async def _give_up(lending: Lending, con: Lent, error: BaseException) -> None:
    """Roll back and give the connection back; one whose task was cancelled is not fit for more."""
    is_clean = False
    try:
        is_clean = isinstance(error, Exception) and await is_rolled_back(con)
    finally:
        await lending.take_back(con, is_clean=is_clean)


def _refuse_rolled_back(status: str) -> None:
    """Raise when Postgres answered a commit by rolling back: a statement's error was swallowed."""
    if status != "COMMIT":
        raise Permanent(
            "The transaction was rolled back, because a statement in it had failed.",
            code="transaction_aborted",
        )
