"""Shapes of outside issuers and identities, as the JSON that clients see.

Called by their routes. Invariant: as in `shapes`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from millpond.errors import Unavailable
from millpond.identity.issuer_documents import Keys
from millpond.identity.issuers import Issuer
from millpond.identity.outside_identities import Identity


def issuer_json(issuer: Issuer) -> dict[str, Any]:
    """Return an issuer."""
    return {
        "id": issuer.issuer_id,
        "object": "issuer",
        "url": issuer.url,
        **asdict(issuer.terms),
        "created_by": issuer.created_by,
        "created_at": issuer.created_at,
        "disabled_at": issuer.disabled_at,
    }


def test_json(keys: Keys, failure: Unavailable | None) -> dict[str, Any]:
    """Return what came of asking an issuer for its keys."""
    listed: dict[str, list[str]] = {}
    for kid, algorithm in keys:
        listed.setdefault(kid, []).append(algorithm)
    return {
        "object": "issuer_test",
        "is_good": failure is None,
        "code": None if failure is None else failure.code,
        "message": None if failure is None else failure.message,
        "keys": [{"kid": kid, "algorithms": found} for kid, found in listed.items()],
    }


def identity_json(identity: Identity) -> dict[str, Any]:
    """Return an outside identity."""
    fields = asdict(identity)
    identity_id = fields.pop("identity_id")
    return {
        "id": identity_id,
        "object": "outside_identity",
        "subject": f"outside:{identity_id}",
        "is_disabled": identity.disabled_at is not None,
        **fields,
    }
