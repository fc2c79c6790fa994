"""What the server answers about the audit log.

Made by `calls` from JSON. Invariant: as in `models`.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from millpond.client.models import Answer


class AuditSeal(Answer):
    """A row's place in the chain; of a head, how far the chain is."""

    seq: int
    mac: str
    key_id: str
    sealed_at: datetime


class AuditEntry(Answer):
    """What somebody did; `seal` is None until the sealer came by."""

    id: uuid.UUID
    at: datetime
    subject: str
    granted_by: str | None = None
    action: str
    resource: str
    run_id: uuid.UUID | None = None
    address: str | None = None
    details: Any = None
    seal: AuditSeal | None = None


class AuditFault(Answer):
    """What does not fit."""

    kind: str
    text: str
    seq: int | None = None
    audit_id: uuid.UUID | None = None


class AuditVerification(Answer):
    """What verifying the log, or a part of it, found."""

    is_intact: bool
    sealed: int
    last_seq: int
    has_more: bool
    unsealed: int
    oldest_unsealed_s: float | None = None
    head: AuditSeal | None = None
    published_seq: int | None = None
    fault_count: int = 0
    first_fault: AuditFault | None = None
