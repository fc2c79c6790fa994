"""The shape of a secret, as the JSON that clients see.

Called by its routes. Invariant: nothing of a value has a place here.
"""

from __future__ import annotations

from typing import Any

from millpond.identity.secret_store import Secret


def secret_json(secret: Secret) -> dict[str, Any]:
    """Return a secret without its value."""
    return {
        "id": secret.secret_id,
        "object": "secret",
        "name": secret.name,
        "description": secret.description,
        "version": secret.version,
        "created_by": secret.created_by,
        "created_at": secret.created_at,
        "changed_by": secret.changed_by,
        "changed_at": secret.changed_at,
        "used_at": secret.used_at,
    }
