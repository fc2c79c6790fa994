"""Signing keys that another process rotated: what is shown and signed by one that nobody sends tokens to."""

from __future__ import annotations

import time
import uuid
from typing import Any

import jwt
import pytest

from millpond.identity.ring import KeyRing
from millpond.identity.seal import KEY_BYTES, Seal
from millpond.identity.signing import rotate

from .conftest import Front
from .test_sign_in import made, post, signed_in

RING = KeyRing(Seal(bytes(KEY_BYTES)))


def older(front: Front, by_s: float) -> None:
    """Let the time pass since the process read the keys."""
    front.keyring._refreshed_at = time.monotonic() - by_s


def kid_of(answer: dict[str, Any]) -> str:
    return str(jwt.get_unverified_header(answer["access_token"])["kid"])


@pytest.mark.parametrize("at_once", [False, True])
async def test_the_key_set_tells_of_a_rotation_elsewhere_within_seconds(
    front: Front, at_once: bool
) -> None:
    nobody = await front.client(token="")
    old = front.keyring._signer.kid
    kid = await rotate(front.db, RING, at_once=at_once)
    older(front, 6)
    shown = await nobody.get("/.well-known/jwks.json")
    assert [key["kid"] for key in shown.json()["keys"]] == ([kid] if at_once else [kid, old])
    assert shown.headers["cache-control"] == "public, max-age=60"


async def test_who_signs_in_after_a_rotation_elsewhere_gets_tokens_that_are_good(
    front: Front,
) -> None:
    nobody = await front.client(token="")
    password = f"a long one {uuid.uuid4()}"
    await made(front, password)
    kid = await rotate(front.db, RING, at_once=True)
    older(front, 61)
    answer = await signed_in(nobody, password)
    assert kid_of(answer) == kid
    caller = await front.client(token=answer["access_token"])
    assert (await caller.get("/v1/me")).status_code == 200

    newer = await rotate(front.db, RING, at_once=True)
    older(front, 61)
    renewed = await post(nobody, "auth/refresh", refresh_token=answer["refresh_token"])
    assert kid_of(renewed.json()) == newer
