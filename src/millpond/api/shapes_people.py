"""Shapes of people: who is signed in, their sessions and places in orgs.

Called by the routes. Invariant: what these functions write is what `models_people` describes; no hash passes.
"""

from __future__ import annotations

import uuid
from typing import Any

from millpond.identity.people import Account, Place, SignedIn
from millpond.identity.sessions import Session


def user_json(account: Account) -> dict[str, Any]:
    """Return somebody with an account."""
    return {
        "id": account.user_id,
        "object": "user",
        "email": account.email,
        "name": account.name,
        "is_operator": account.is_operator,
    }


def seat_json(place: Place) -> dict[str, Any]:
    """Return a place in an org."""
    return {
        "id": place.seat.org_id,
        "object": "seat",
        "slug": place.seat.slug,
        "name": place.name,
        "role": place.seat.role,
        "is_suspended": place.is_suspended,
    }


def signed_in_json(signed_in: SignedIn) -> dict[str, Any]:
    """Return what somebody gets who is signed in."""
    return {
        "object": "signed_in",
        "access_token": signed_in.access_token,
        "token_type": "Bearer",
        "expires_in": signed_in.expires_in_s,
        "refresh_token": signed_in.refresh_token,
        "session_id": signed_in.session_id,
        "user": user_json(signed_in.account),
        "organizations": [seat_json(place) for place in signed_in.places],
    }


def session_json(session: Session, current: uuid.UUID | None) -> dict[str, Any]:
    """Return a signed-in device."""
    return {
        "id": session.session_id,
        "object": "session",
        "address": session.address,
        "agent": session.agent,
        "created_at": session.created_at,
        "used_at": session.used_at,
        "expires_at": session.expires_at,
        "is_current": session.session_id == current,
    }
