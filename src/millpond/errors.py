"""The error tree: one class per reaction, raised by every room.

Called by all; the executor reads the class of an error to decide what happens to a step, and
`api/problems.py` alone turns it into HTTP. Invariant: no message holds a secret or prompt text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class MillpondError(Exception):
    """The base of every error that Millpond raises on purpose.

    `code` is a stable machine word, `param` the field at fault, `advice` what to do next.
    """

    code = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        advice: str | None = None,
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.advice = advice
        self.details: dict[str, object] = dict(details or {})


class Permanent(MillpondError):
    """Trying again cannot help: the step fails at once."""

    code = "permanent"


class InvalidInput(Permanent):
    """What was given does not fit what is expected; `param` names the field."""

    code = "invalid_input"


class NotFound(Permanent):
    """The named thing does not exist for this caller."""

    code = "not_found"


class Unauthenticated(Permanent):
    """Who calls is not known: the token is missing, malformed, expired or revoked."""

    code = "unauthenticated"


class Forbidden(Permanent):
    """The caller is known and may not do this."""

    code = "forbidden"


class Conflict(Permanent):
    """The thing is in a state that does not allow this."""

    code = "conflict"


class OverQuota(Permanent):
    """The org has used up what its plan allows, or its plan has no such feature.

    `details` name quota, used, maximum and renews_at, or the feature.
    """

    code = "quota_exceeded"


class Transient(MillpondError):
    """Trying again later may help; `retry_after_s` is the other side's wish, in seconds.

    `limit_keys` name the other side as limits do, such as `provider:openai`: with a wish, or with status 429 in
    `details`, work on these keys cools down; without one it counts for their breaker.
    """

    code = "transient"

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        code: str | None = None,
        param: str | None = None,
        advice: str | None = None,
        details: Mapping[str, object] | None = None,
        limit_keys: Sequence[str] = (),
    ) -> None:
        super().__init__(message, code=code, param=param, advice=advice, details=details)
        self.retry_after_s = retry_after_s
        self.limit_keys = tuple(limit_keys)


class BlockGone(Transient):
    """A block that should pay was taken back meanwhile, or its period is over: nothing is stored, take another."""

    code = "quota_block_gone"


class Unavailable(Transient):
    """The database or a needed service cannot be reached right now."""

    code = "unavailable"


class NotDone(MillpondError):
    """A `once` step declares that its effect surely did not happen, so it may run again."""

    code = "not_done"


class LeaseLost(MillpondError):
    """The worker no longer holds the right to this work item: it stops and writes nothing."""

    code = "lease_lost"


class SchemaMismatch(MillpondError):
    """The database's schema and this code's migrations differ; start is refused."""

    code = "schema_mismatch"
