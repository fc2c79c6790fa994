"""Driver errors become Millpond's: the only file that knows asyncpg's error classes.

Called by `pool` around every transaction. Invariant: no driver detail and no parameter value passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from millpond.errors import (
    BlockGone,
    Conflict,
    Forbidden,
    InvalidInput,
    MillpondError,
    Permanent,
    Transient,
    Unauthenticated,
    Unavailable,
)

# Connections lost (08), resources exhausted (53), shutdown or takeover (57, 25006), a session that
# the server ended (25P03, 25P04), failing storage (58).
_GONE = (
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.TransactionTimeoutError,
    asyncpg.PostgresSystemError,
)
# Rolled back for others' sake (40), a lock or the statement timeout.
_AGAIN = (
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.QueryCanceledError,
)


def _stale() -> MillpondError:
    return Unauthenticated(
        "What this token was signed for has changed or was taken away.",
        code="token_stale",
        advice="refresh the token, or sign in again",
    )


def _suspended() -> MillpondError:
    return Forbidden(
        "This organization is suspended.",
        code="org_suspended",
        advice="ask the operator of this installation",
    )


def _unpaid() -> MillpondError:
    return BlockGone("What should pay for the run was taken back.")


# Raised by `refuse_stale` (migration 0004) and `open_submit` (migration 0041).
_REFUSED = {"MP401": _stale, "MP402": _unpaid, "MP403": _suspended}


def translate(error: Exception) -> MillpondError | None:
    """Return Millpond's error for a driver's, or None when it is not a driver's."""
    if isinstance(error, asyncpg.PostgresError):
        return _from_server(error)
    if isinstance(error, asyncpg.ClientConfigurationError):
        return InvalidInput("The database address is malformed.", code="database_url")
    if isinstance(error, asyncpg.InterfaceError):
        return _from_driver(error)
    if isinstance(error, asyncpg.InternalClientError):
        # Seen when a session is ended in the middle of an exchange: the driver loses its place.
        return Unavailable("The database connection broke.", retry_after_s=1.0)
    return None


def _from_server(error: asyncpg.PostgresError) -> MillpondError:
    """Sort an error that the server sent by what the caller can do about it."""
    if error.sqlstate in _REFUSED:
        return _REFUSED[error.sqlstate]()
    if isinstance(error, _AGAIN):
        return Transient("The database asked to try this transaction again.", retry_after_s=0.05)
    if isinstance(error, _GONE):
        return Unavailable("The database is not reachable.", retry_after_s=1.0)
    if isinstance(error, asyncpg.UniqueViolationError):
        details = {"constraint": error.constraint_name}
        return Conflict("A row with this key exists.", details=details)
    if isinstance(error, asyncpg.InvalidAuthorizationSpecificationError):
        return Permanent("The database refused the role or its password.", code="database_login")
    if isinstance(error, asyncpg.InvalidCatalogNameError):
        return Permanent("The database named in the address does not exist.", code="database_url")
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        return Permanent("The database role may not do this.", code="database_privilege")
    if isinstance(error, asyncpg.DataError | asyncpg.IntegrityConstraintViolationError):
        return InvalidInput("The database refused a value.", code="unstorable_value")
    return Permanent(f"The database refused a statement ({type(error).__name__}).")


def _from_driver(error: asyncpg.InterfaceError) -> MillpondError:
    """Sort an error that the driver raised by itself."""
    if isinstance(error, ValueError):
        return InvalidInput("A parameter does not fit its column.", code="unstorable_value")
    if "operation is in progress" in str(error):
        return Permanent(
            "Two tasks used one database connection at once.", code="connection_shared"
        )
    if "the server expects" in str(error):
        return Permanent("A statement was given too many or too few arguments.", code="arguments")
    return Unavailable("The database connection was closed.", retry_after_s=1.0)


def in_our_words(error: BaseException, *, connecting: bool) -> BaseException:
    """Return Millpond's error for a driver's, or the error itself when it is not a driver's.

    While `connecting`, an operating system's error or a timeout means that Postgres is away; inside
    a transaction such an error is the block's own and passes as it is.
    """
    if not isinstance(error, Exception):
        return error
    ours = translate(error)
    if ours is None and connecting and isinstance(error, OSError):
        return Unavailable("The database is not reachable.", retry_after_s=1.0)
    return error if ours is None else ours


@contextmanager
def translated(*, connecting: bool = False) -> Iterator[None]:
    """Raise Millpond's error in place of the driver's; see `in_our_words`."""
    try:
        yield
    except Exception as error:
        if (ours := in_our_words(error, connecting=connecting)) is error:
            raise
        raise ours from error
