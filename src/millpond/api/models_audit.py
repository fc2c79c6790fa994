"""Models of the audit log: its rows, their seals, and what verifying found.

Called by its routes. Invariant: what is shown of a row is what its seal covers.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field


class SealOut(BaseModel):
    """A row's place in the chain."""

    seq: int = Field(description="Its place, from 1 without a gap.")
    mac: str = Field(description="HMAC-SHA256 over the row and the seal before it, as hex digits.")
    key_id: str = Field(description="Which key sealed it.")
    sealed_at: datetime


class AuditEntry(BaseModel):
    """What somebody did."""

    id: uuid.UUID
    object: Literal["audit_entry"]
    at: datetime
    subject: str = Field(description="Who: `user:…`, `key:…`, `service:…`, `outside:…`, `run:…`.")
    granted_by: str | None = Field(description="The owner who let this operator in.")
    action: str = Field(description="What: `noun.past_tense`.")
    resource: str = Field(description="To what: `kind:id`.")
    run_id: uuid.UUID | None = Field(description="In or to which run.")
    address: str | None = Field(description="From where.")
    details: Any
    seal: SealOut | None = Field(description="Null until the sealer came by: 2 s.")


class AuditHead(BaseModel):
    """How far a chain is."""

    seq: int
    mac: str
    key_id: str
    sealed_at: datetime


class AuditFault(BaseModel):
    """What does not fit."""

    kind: Literal[
        "row_changed", "row_removed", "seal_removed", "key_unknown", "tail_cut", "fork", "unsealed"
    ]
    text: str
    seq: int | None = Field(description="At which place of the chain.")
    audit_id: uuid.UUID | None = Field(description="In which row.")


class AuditVerification(BaseModel):
    """What verifying the log, or a part of it, found."""

    object: Literal["audit_verification"]
    is_intact: bool = Field(description="Whether nothing was found in this part.")
    sealed: int = Field(description="How many seals were computed again.")
    last_seq: int = Field(description="The last of them; go on with `after` this.")
    has_more: bool = Field(description="Whether the chain goes on after them.")
    unsealed: int = Field(description="How many rows wait for a seal.")
    oldest_unsealed_s: float | None = Field(description="How long the oldest of those waits.")
    head: AuditHead | None = Field(description="How far the chain is.")
    published_seq: int | None = Field(
        description="The last place in this part that this server published outside the database."
    )
    fault_count: int
    first_fault: AuditFault | None
