"""Which principal a token makes in which org, and when the database refuses it."""

from __future__ import annotations

import asyncpg
import pytest

from millpond.db.embedded import Urls
from millpond.db.pool import Database
from millpond.errors import Forbidden, InvalidInput, Unauthenticated
from millpond.identity.orgs import ensure_org
from millpond.identity.passport import Passport, Seat
from millpond.identity.permissions import PERMISSIONS, PLATFORM, ROLES, permissions_of
from millpond.identity.ring import KeyRing
from millpond.identity.seal import KEY_BYTES, Seal
from millpond.identity.tokens import Keyring
from millpond.types import NO_ORG, Principal, new_id

ACME = Seat(org_id=1, slug="acme", role="builder", stamp=3)
BANK = Seat(org_id=2, slug="bank", role="teller", stamp=1, custom=frozenset({"runs:read", "x:y"}))


def test_a_bearer_of_several_orgs_names_one_by_id_or_slug() -> None:
    passport = Passport(subject="user:x", session_id=new_id(), seats=[ACME, BANK])
    assert passport.in_org("bank").org_id == passport.in_org("2").org_id == 2
    assert passport.in_org("acme").permissions == ROLES["builder"]
    with pytest.raises(InvalidInput, match=r"acme, bank.*say which"):
        passport.in_org()
    with pytest.raises(Forbidden):
        passport.in_org("other")


def test_a_custom_role_gives_only_permissions_that_exist() -> None:
    assert BANK.permissions == {"runs:read"}
    assert permissions_of("nobody-knows") == frozenset()


def test_no_role_of_an_org_holds_a_permission_of_the_platform() -> None:
    assert not any(ROLES[role] & PLATFORM for role in ROLES)
    assert ROLES["owner"] | PLATFORM == set(PERMISSIONS)


def test_only_an_operator_may_anything_on_the_platform() -> None:
    plain = Passport(subject="user:x", session_id=new_id(), seats=[ACME])
    assert plain.on_platform().permissions == frozenset()
    operator = Passport(subject="user:x", session_id=new_id(), is_operator=True)
    assert operator.on_platform().may("platform:write")
    assert operator.on_platform().org_id == NO_ORG


@pytest.fixture
async def db(urls: Urls):
    db = await Database.connect(urls.app)
    yield db
    await db.close()


async def seated(db: Database, owner: asyncpg.Connection) -> tuple[Passport, Keyring]:
    org_id = await ensure_org(db, "acme", "Acme")
    user_id, session_id = new_id(), new_id()
    await owner.execute("insert into account (user_id, email) values ($1, 'a@x.example')", user_id)
    await owner.execute(
        "insert into login_session (session_id, user_id, expires_at) values ($1, $2, now() + '1 h')",
        session_id,
        user_id,
    )
    await owner.execute(
        "insert into membership (org_id, user_id, role, added_by) values ($1, $2, 'admin', 'x')",
        org_id,
        user_id,
    )
    seat = Seat(org_id=org_id, slug="acme", role="admin", stamp=1)
    keyring = await Keyring.open(db, KeyRing(Seal(bytes(KEY_BYTES))))
    passport = Passport(subject=f"user:{user_id}", session_id=session_id, stamp=1, seats=[seat])
    return keyring.read(keyring.mint_access(passport, 60)), keyring


async def opens(db: Database, principal: Principal) -> None:
    async with db.of(principal) as con:
        await con.fetchval("select 1")


CHANGES = {
    "session": "update login_session set revoked_at = now(), revoked_why = 'x'",
    "expiry": "update login_session set expires_at = now()",
    "role": "update membership set version = version + 1",
    "removal": "delete from membership",
    "account": "update account set disabled_at = now()",
}


@pytest.mark.parametrize("change", CHANGES)
async def test_rights_that_changed_are_refused_in_the_next_transaction(
    db: Database, admin_url: str, change: str
) -> None:
    admin = await asyncpg.connect(admin_url, server_settings={"search_path": "millpond"})
    try:
        passport, _ = await seated(db, admin)
        principal = passport.in_org()
        await opens(db, principal)
        await admin.execute(CHANGES[change])
        with pytest.raises(Unauthenticated) as refused:
            await opens(db, principal)
        assert refused.value.code == "token_stale"
    finally:
        await admin.close()


async def test_nothing_is_opened_in_a_suspended_org(db: Database, admin_url: str) -> None:
    admin = await asyncpg.connect(admin_url, server_settings={"search_path": "millpond"})
    try:
        passport, _ = await seated(db, admin)
        await admin.execute("update org set suspended_at = now(), suspended_reason = 'unpaid'")
        with pytest.raises(Forbidden) as refused:
            await opens(db, passport.in_org())
        assert refused.value.code == "org_suspended"
    finally:
        await admin.close()


async def test_a_subject_that_is_no_id_never_reaches_a_statement(db: Database) -> None:
    passport = Passport(subject="user:x'); drop table run; --", session_id=new_id(), seats=[ACME])
    with pytest.raises(ValueError, match="kind:uuid"):
        await opens(db, passport.in_org())
