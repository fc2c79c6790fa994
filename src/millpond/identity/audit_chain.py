"""The chain over an audit log, pure: what a seal is computed of.

Called by the sealer, by whoever verifies, and by the export. Invariants: a seal covers every member of its row, the
seal before it, its own place, time and key, and whose log it is; two different rows never have the same bytes.
"""

from __future__ import annotations

import hmac
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import orjson

PURPOSE = "audit"
# What comes before the first seal.
START = bytes(32)
_FORMAT = "millpond.audit.1"


class Keys(Protocol):
    """Gives the key that seals now, by its id, and those that sealed before."""

    @property
    def key_id(self) -> str:
        """The id of the key that seals now."""
        ...

    def derive(self, purpose: str, key_id: str) -> bytes:
        """Return the key for one purpose; raises Permanent for an id that is not known."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row of an audit log; `details` is its JSON text, letter by letter as it is stored."""

    audit_id: uuid.UUID
    at: datetime
    subject: str
    granted_by: str | None
    action: str
    resource: str
    run_id: uuid.UUID | None
    address: str | None
    details: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A place in a chain: how far it was, and the seal there. Org 0 is the platform."""

    org_id: int
    seq: int
    mac: bytes
    key_id: str
    sealed_at: datetime


def entry_of(row: Any) -> Entry:
    """Return a row as read by the statements of `audit_chain.sql`."""
    run_id = row["run_id"]
    return Entry(
        audit_id=uuid.UUID(int=row["audit_id"].int),
        at=row["at"],
        subject=row["subject"],
        granted_by=row["granted_by"],
        action=row["action"],
        resource=row["resource"],
        run_id=None if run_id is None else uuid.UUID(int=run_id.int),
        address=row["address"],
        details=row["details"],
    )


def time_text(at: datetime) -> str:
    """Return a time as seals and exports have it: UTC with six digits of a second."""
    return at.astimezone(UTC).isoformat(timespec="microseconds")


def members(entry: Entry) -> dict[str, str | None]:
    """Return what a seal covers of a row, in its order; exports show the same."""
    return {
        "audit_id": str(entry.audit_id),
        "at": time_text(entry.at),
        "subject": entry.subject,
        "granted_by": entry.granted_by,
        "action": entry.action,
        "resource": entry.resource,
        "run_id": None if entry.run_id is None else str(entry.run_id),
        "address": entry.address,
        "details": entry.details,
    }


def mac_of(
    key: bytes,
    previous: bytes,
    entry: Entry,
    *,
    org_id: int,
    seq: int,
    key_id: str,
    sealed_at: datetime,
) -> bytes:
    """Return the seal of a row: HMAC-SHA256 over the seal before it and a JSON array of all that it covers."""
    place = [_FORMAT, org_id, seq, key_id, time_text(sealed_at)]
    return hmac.digest(key, previous + orjson.dumps([*place, *members(entry).values()]), "sha256")
