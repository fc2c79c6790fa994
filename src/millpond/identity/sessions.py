"""Sessions: signed-in devices, what renews them, and their end.

Called by `sign_in`, `accounts` and the routes. Invariants: a refresh token works once; a second use of one ends its
session, since one of the two users stole it; whoever has a session that ended is refused by the database.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime

from millpond.db.pool import Connection
from millpond.db.queries import queries
from millpond.errors import NotFound, Unauthenticated
from millpond.identity import audit
from millpond.identity.single_use import REFRESH_PREFIX, digest_of, new_secret
from millpond.types import NO_ORG, Principal, new_id

_SQL = queries("people")
_MAX_AGENT_CHARS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Lifetimes:
    """How long, in seconds: an access token, an unused session, a session at all, a mailed link."""

    access_s: float = 900.0
    idle_s: float = 14 * 86_400.0
    session_s: float = 90 * 86_400.0
    link_s: float = 3_600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Where somebody signs in from, for the list of sessions and the audit log."""

    address: str | None = None
    agent: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """A signed-in device, as its owner sees it."""

    session_id: uuid.UUID
    address: str | None
    agent: str | None
    created_at: datetime
    used_at: datetime
    expires_at: datetime


def person(user_id: uuid.UUID) -> Principal:
    """Return somebody as the audit log of the platform names them."""
    return Principal(org_id=NO_ORG, subject=f"user:{user_id}")


async def open_session(
    con: Connection, user_id: uuid.UUID, device: Device, lifetimes: Lifetimes
) -> tuple[uuid.UUID, str]:
    """Open a session; returns its id and its first refresh token."""
    session_id = new_id()
    agent = device.agent[:_MAX_AGENT_CHARS] if device.agent else None
    await con.execute(
        _SQL["add_session"], session_id, user_id, device.address, agent, lifetimes.session_s
    )
    await audit.record(
        con,
        person(user_id),
        "session.started",
        f"session:{session_id}",
        address=device.address,
    )
    return session_id, await renewable(con, session_id, lifetimes)


async def renewable(con: Connection, session_id: uuid.UUID, lifetimes: Lifetimes) -> str:
    """Store and return a new refresh token of a session."""
    secret = new_secret(REFRESH_PREFIX)
    await con.execute(_SQL["add_refresh"], digest_of(secret), session_id, lifetimes.idle_s)
    return secret


async def use_refresh(
    con: Connection, secret: str, device: Device
) -> tuple[uuid.UUID, uuid.UUID] | None:
    """Use a refresh token up; returns whose session it renews and the session, or None for one that does not.

    One that was used before ends its session, audited: the caller commits before it refuses.
    """
    digest = digest_of(secret)
    await con.execute(_SQL["hold_session_of_refresh"], digest)
    session_id = await con.fetchval(_SQL["use_refresh"], digest)
    if session_id is not None:
        user_id = await con.fetchval(_SQL["touch_session"], session_id)
        return None if user_id is None else (user_id, session_id)
    row = await con.fetchrow(_SQL["used_refresh"], digest)
    if row is not None and await _end(con, row["user_id"], row["session_id"], "reused"):
        await audit.record(
            con,
            person(row["user_id"]),
            "refresh.reused",
            f"session:{row['session_id']}",
            address=device.address,
        )
    return None


async def end_by_refresh(con: Connection, secret: str, device: Device) -> None:
    """End the session of a refresh token, used or not; what is unknown or over is left as it is."""
    row = await con.fetchrow(_SQL["session_of_refresh"], digest_of(secret))
    if row is not None and await _end(con, row["user_id"], row["session_id"], "signed_out"):
        await _tell(con, row["user_id"], row["session_id"], "signed_out", device)


async def list_sessions(con: Connection, user_id: uuid.UUID) -> list[Session]:
    """List somebody's live sessions, newest first."""
    return [Session(**row) for row in await con.fetch(_SQL["sessions"], user_id)]


async def revoke_session(
    con: Connection, user_id: uuid.UUID, session_id: uuid.UUID, device: Device
) -> None:
    """End one of somebody's sessions; raises NotFound when they have no such live one."""
    if not await _end(con, user_id, session_id, "revoked"):
        raise NotFound(f"You have no session {session_id}.", param="session_id")
    await _tell(con, user_id, session_id, "revoked", device)


async def revoke_others(
    con: Connection, user_id: uuid.UUID, kept: uuid.UUID | None, why: str, device: Device
) -> None:
    """End all of somebody's sessions but one, or all."""
    for row in await con.fetch(_SQL["revoke_sessions"], user_id, kept, why):
        await _tell(con, user_id, row["session_id"], why, device)


async def _end(con: Connection, user_id: uuid.UUID, session_id: uuid.UUID, why: str) -> bool:
    return await con.fetchval(_SQL["revoke_session"], session_id, user_id, why) is not None


async def _tell(
    con: Connection, user_id: uuid.UUID, session_id: uuid.UUID, why: str, device: Device
) -> None:
    await audit.record(
        con,
        person(user_id),
        "session.revoked",
        f"session:{session_id}",
        details={"why": why},
        address=device.address,
    )


def not_renewed() -> Unauthenticated:
    """Make the refusal of a refresh token, whatever is wrong with it."""
    return Unauthenticated(
        "This refresh token is not valid: it was used, or the session is over.",
        code="refresh_invalid",
        advice="sign in again",
    )
