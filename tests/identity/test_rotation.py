"""Signing keys are rotated: old tokens stay good for a while, or not."""

from __future__ import annotations

import asyncio

import pytest

from millpond.db.pool import Database
from millpond.errors import Unauthenticated
from millpond.identity.ring import KeyRing
from millpond.identity.seal import KEY_BYTES, Seal
from millpond.identity.signing import listed, rotate
from millpond.identity.tokens import Keyring
from millpond.types import Principal

SEAL = KeyRing(Seal(bytes(KEY_BYTES)))
ANN = Principal(org_id=7, subject="user:ann", permissions=frozenset({"runs:read"}))


async def aged(keyring: Keyring) -> Keyring:
    """Let a keyring read the keys as it does after a minute."""
    keyring._refreshed_at = float("-inf")
    await keyring.refresh()
    return keyring


async def test_a_rotated_key_signs_in_every_process_and_old_tokens_stay_good(db: Database) -> None:
    here, there = await Keyring.open(db, SEAL), await Keyring.open(db, SEAL)
    old = here.mint(ANN, "pond", 60)
    kid = await rotate(db, SEAL)
    await aged(there)
    new = there.mint(ANN, "pond", 60)
    assert there._signer.kid == kid
    assert there.verify(old) == there.verify(new) == ANN
    assert {key["kid"] for key in there.jwks()["keys"]} == {kid, here._signer.kid}
    assert [key.state for key in await listed(db)] == ["current", "overlapping"]


async def test_a_key_that_is_ended_at_once_verifies_nothing(db: Database) -> None:
    keyring = await Keyring.open(db, SEAL)
    old = keyring.mint(ANN, "pond", 60)
    keyring.verify(old)
    await rotate(db, SEAL, at_once=True)
    await aged(keyring)
    with pytest.raises(Unauthenticated) as refused:
        keyring.verify(old)
    assert refused.value.code == "token_unknown_key"
    assert keyring.verify(keyring.mint(ANN, "pond", 60)) == ANN


async def test_rotations_at_the_same_time_leave_one_current_key(db: Database) -> None:
    await Keyring.open(db, SEAL)
    await asyncio.gather(*(rotate(db, SEAL) for _ in range(4)))
    states = [key.state for key in await listed(db)]
    assert (states.count("current"), states.count("overlapping")) == (1, 4)


async def test_a_rotation_is_told_in_the_platforms_audit_log(db: Database) -> None:
    kid = await rotate(db, SEAL)
    async with db.globals() as con:
        rows = await con.fetch("select subject, action, resource from platform_audit")
    assert [tuple(row) for row in rows] == [("host", "signing_key.rotated", f"signing_key:{kid}")]
