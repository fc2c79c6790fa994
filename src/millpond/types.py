"""The small types that every layer shares: ids, states, principals, JSON.

Pure: no I/O, no clock but for the time part of new ids. Names follow the glossary.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple

# JSON as `orjson` reads and writes it; `Any` where a reader must narrow it first.
Json = Any


class RunState(StrEnum):
    """Where a run stands. The last three are final."""

    SCHEDULED = "scheduled"
    QUEUED = "queued"
    RUNNING = "running"
    WAITING = "waiting"
    AWAITING_INPUT = "awaiting_input"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether a run in this state can no longer change."""
        return self in FINAL_STATES


FINAL_STATES = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED})


def new_id() -> uuid.UUID:
    """Make a UUID of version 7 (RFC 9562): ordered by time in ms, random below it."""
    value = int.from_bytes(os.urandom(10), "big")
    millis = time.time_ns() // 1_000_000
    number = (millis << 80) | value
    number = (number & ~(0xF << 76)) | (0x7 << 76)
    number = (number & ~(0x3 << 62)) | (0x2 << 62)
    return uuid.UUID(int=number)


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What a principal's rights stand on; the database is asked in every transaction whether it still does.

    `stamp` is the version of the rights, `session_id` the signed-in device, `grant_id` the grant by which
    an operator is let into an org.
    """

    stamp: int
    session_id: uuid.UUID | None = None
    grant_id: uuid.UUID | None = None


# The org of a principal that acts on the platform itself and sees no org's rows.
NO_ORG = 0


# The version of rights of a run whose rights nobody asks for: true ones are not negative.
_NOT_ASKED = -1


class Backing(NamedTuple):
    """What a run's rights stand on, asked again before every step with an effect.

    `stamp` is the version of the subject's rights at the start, `permission` what starting it took (words with
    spaces between), `lent` the grant under which an operator started it and `granted_by` who gave that.
    What an ending starts needs no right: its backing `is_asked` about no more, and only tells of the grant.
    """

    stamp: int
    permission: str | None = None
    lent: uuid.UUID | None = None
    granted_by: str | None = None

    @property
    def is_asked(self) -> bool:
        """Whether rights are asked for at all."""
        return self.stamp != _NOT_ASKED

    def unasked(self) -> Backing | None:
        """Return what is left of this where no right is needed any more: the grant; None without one."""
        return None if self.lent is None else self._replace(stamp=_NOT_ASKED, permission=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """Who acts, in which org, with which permissions and roles.

    `subject` is `user:…`, `key:…`, `service:…`, `outside:…` or `run:…`; a permission is `noun:verb`. Without
    a `standing` the rights were signed on the machine itself (`millpond token`) and end with the token.
    `granted_by` is the owner who let an operator in.
    """

    org_id: int
    subject: str
    permissions: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()
    standing: Standing | None = None
    granted_by: str | None = None

    def may(self, permission: str) -> bool:
        """Whether this principal holds `permission`, by name or by the wildcard `*`."""
        return permission in self.permissions or "*" in self.permissions

    def backing(self, *permissions: str | None) -> Backing | None:
        """Return what a run stands on that took these permissions to start; None without a standing."""
        if self.standing is None:
            return None
        return Backing(
            stamp=self.standing.stamp,
            permission=" ".join(sorted({one for one in permissions if one})) or None,
            lent=self.standing.grant_id,
            granted_by=None if self.standing.grant_id is None else self.granted_by,
        )


ClosePolicy = Literal["cancel", "abandon", "wait"]

# The class of a run: whether somebody waits for it. What is interactive goes before what is not, up to a bound.
Urgency = Literal["standard", "interactive"]
STANDARD: Urgency = "standard"
INTERACTIVE: Urgency = "interactive"


def lesser(one: Urgency, other: Urgency) -> Urgency:
    """Return the class of what is interactive only where both are."""
    return INTERACTIVE if one == other == INTERACTIVE else STANDARD


@dataclass(frozen=True, kw_only=True, slots=True)
class Parent:
    """The run that starts a child, the step in which it does, and what its end means for the child."""

    run_id: uuid.UUID
    step_key: str
    close_policy: ClosePolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The run that another one repeats (from a step on, where named) or goes on from."""

    run_id: uuid.UUID
    kind: Literal["rerun", "continued"]
    from_step: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent:
    """A wish to run a flow, as accepted: what `engine.submit` makes a run of.

    `delay_s` and `deadline_s` count from submit on the database's clock; a higher `priority` goes
    earlier. `input` is JSON text in UTF-8, already validated. `dedup_key` is the live key that the
    caller took for it; `duties` are bits of `engine.duties` beside those that follow from the rest. Without a
    `backing` there is nothing to ask before its steps. `behind` are those by whom a run that a schedule or an event
    started came to be: they count as its starters.
    """

    org_id: int
    flow: str
    version: int
    queue: str
    input: bytes
    subject: str
    priority: int = 0
    delay_s: float = 0.0
    keys: Sequence[str] = ()
    timeout_s: float | None = None
    traceparent: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    run_id: uuid.UUID = field(default_factory=new_id)
    deadline_s: float | None = None
    dedup_key: str | None = None
    parent: Parent | None = None
    origin: Origin | None = None
    duties: int = 0
    backing: Backing | None = None
    behind: Sequence[str] = ()
    urgency: Urgency = STANDARD
