"""What calls about secrets give: everything but values.

Made from JSON answers by `calls`. Invariant: a member that a newer server sends is kept and harms nothing.
"""

from __future__ import annotations

import uuid
from datetime import datetime

from millpond.client.models import Answer


class Secret(Answer):
    """A secret of the organization, without its value."""

    id: uuid.UUID
    name: str
    description: str = ""
    version: int
    created_by: str
    created_at: datetime
    changed_by: str
    changed_at: datetime
    used_at: datetime | None = None
