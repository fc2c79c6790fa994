"""Exit codes: what a script that calls `millpond` may rely on. Kept here and nowhere else.

Called by every command; documented in `docs/cli.md`. Invariant: a code never changes its meaning.
"""

from __future__ import annotations

from enum import IntEnum

from millpond.errors import (
    Conflict,
    Forbidden,
    InvalidInput,
    MillpondError,
    NotFound,
    OverQuota,
    SchemaMismatch,
    Transient,
    Unauthenticated,
)


class ExitCode(IntEnum):
    """How a command ended."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    DENIED = 4
    UNAVAILABLE = 5
    CONFLICT = 6
    TIMED_OUT = 7
    UNPROVEN = 8
    INTERRUPTED = 130


MEANINGS: dict[ExitCode, str] = {
    ExitCode.OK: "done; with --wait: the run succeeded",
    ExitCode.FAILED: "the run failed or was cancelled, or the operation failed",
    ExitCode.USAGE: "wrong use: an option, an argument or an input that does not fit",
    ExitCode.NOT_FOUND: "the named run, flow, request or knowledge base does not exist",
    ExitCode.DENIED: "no valid token, or the token may not do this",
    ExitCode.UNAVAILABLE: "the server or the database cannot be reached, or is too busy",
    ExitCode.CONFLICT: "the state does not allow it: already finished, already running, old schema, a quota is used up",
    ExitCode.TIMED_OUT: "--timeout passed before the run finished; the run goes on",
    ExitCode.UNPROVEN: "nothing wrong was found, but an audit log has no published head that would show a cut end",
    ExitCode.INTERRUPTED: "stopped by Ctrl-C",
}

_BY_CLASS: tuple[tuple[type[MillpondError], ExitCode], ...] = (
    (InvalidInput, ExitCode.USAGE),
    (NotFound, ExitCode.NOT_FOUND),
    (Unauthenticated, ExitCode.DENIED),
    (Forbidden, ExitCode.DENIED),
    (Conflict, ExitCode.CONFLICT),
    (OverQuota, ExitCode.CONFLICT),
    (SchemaMismatch, ExitCode.CONFLICT),
    (Transient, ExitCode.UNAVAILABLE),
)


class TimedOut(MillpondError):
    """The caller's own patience ended; what it waited for goes on."""

    code = "timed_out"


class Interrupted(MillpondError):
    """Whoever started the command ended it by a signal."""

    code = "interrupted"


def exit_code(error: MillpondError) -> ExitCode:
    """Return the code for an expected error, by its class."""
    if isinstance(error, TimedOut):
        return ExitCode.TIMED_OUT
    if isinstance(error, Interrupted):
        return ExitCode.INTERRUPTED
    for kind, code in _BY_CLASS:
        if isinstance(error, kind):
            return code
    return ExitCode.FAILED
