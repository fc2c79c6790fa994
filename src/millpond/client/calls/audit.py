"""Calls about the audit log: what was done, and whether the log is whole."""

from __future__ import annotations

from datetime import datetime

from millpond.client.call import Call, Id, get, id_text, path_of, time_text
from millpond.client.models import Page
from millpond.client.models_audit import AuditEntry, AuditVerification


def list_audit(
    *,
    subject: str | None = None,
    action: str | None = None,
    resource: str | None = None,
    run_id: Id | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[AuditEntry]]:
    """What was done in the organization, newest first."""
    return get(
        path_of("audit"),
        Page[AuditEntry],
        subject=subject,
        action=action,
        resource=resource,
        run_id=id_text(run_id),
        since=time_text(since),
        until=time_text(until),
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def list_platform_audit(
    *,
    subject: str | None = None,
    action: str | None = None,
    resource: str | None = None,
    run_id: Id | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[AuditEntry]]:
    """What was done on the platform itself, newest first."""
    return get(
        path_of("platform", "audit"),
        Page[AuditEntry],
        subject=subject,
        action=action,
        resource=resource,
        run_id=id_text(run_id),
        since=time_text(since),
        until=time_text(until),
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def verify_audit(*, after: int | None = None, limit: int | None = None) -> Call[AuditVerification]:
    """Compute a part of the chain again, from a place on."""
    return get(path_of("audit", "verification"), AuditVerification, after=after, limit=limit)
