"""Driver errors become Millpond's: the only file that knows asyncpg's error classes.

Called by `pool` around every transaction. Invariant: no driver detail and no parameter value passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from millpond.errors import Conflict, InvalidInput, MillpondError, Permanent, Transient, Unavailable

_GONE = (
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.ConnectionDoesNotExistError,
)
_AGAIN = (
    asyncpg.SerializationError,
    asyncpg.DeadlockDetectedError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
)


def translate(error: Exception) -> MillpondError | None:
    """Return Millpond's error for a driver's, or None when it is not a driver's."""
    if isinstance(error, MillpondError):
        return None
    if isinstance(error, _GONE):
        return Unavailable("The database is not reachable.", retry_after_s=1.0)
    if isinstance(error, _AGAIN):
        return Transient("The database asked to try this transaction again.", retry_after_s=0.05)
    if isinstance(error, asyncpg.UniqueViolationError):
        return Conflict("A row with this key exists.", details={"constraint": error.constraint_name})
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return Permanent("The database role may not do this.", code="database_privilege")
    if isinstance(error, asyncpg.InterfaceError) and isinstance(error, ValueError):
        return InvalidInput("A parameter does not fit its column.", code="unstorable_value")
    if isinstance(error, asyncpg.DataError | asyncpg.IntegrityConstraintViolationError):
        return InvalidInput("The database refused a value.", code="unstorable_value")
    if isinstance(error, asyncpg.PostgresError | asyncpg.InternalClientError):
        return Permanent(f"The database refused a statement ({type(error).__name__}).")
    if isinstance(error, asyncpg.InterfaceError):
        return Unavailable("The database connection was closed.", retry_after_s=1.0)
    return None


@contextmanager
def translated(*, connecting: bool = False) -> Iterator[None]:
    """Raise Millpond's error in place of the driver's.

    While `connecting`, an operating system's error or a timeout means that Postgres is away; inside
    a transaction such an error is the block's own and passes as it is.
    """
    try:
        yield
    except Exception as error:
        ours = translate(error)
        if ours is None and connecting and isinstance(error, OSError):
            ours = Unavailable("The database is not reachable.", retry_after_s=1.0)
        if ours is None:
            raise
        raise ours from error
