"""Signing in, renewing, signing out, and what a stranger can learn from it: nothing."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx2
import pytest

from millpond.identity.accounts import create_account
from millpond.identity.brake import PAIR
from millpond.identity.passwords import Passwords

from .conftest import Client, Front, quick_passwords

EMAIL = "ann@pond.example"


@pytest.fixture
def password() -> str:
    return f"a long one {uuid.uuid4()}"


async def made(front: Front, password: str, email: str = EMAIL) -> uuid.UUID:
    """Make an account as the product does."""
    hashed = await quick_passwords().hash(password)
    async with front.db.globals() as con:
        return await create_account(con, email, "Ann", hashed)


async def seat(front: Front, user_id: uuid.UUID, role: str = "builder") -> None:
    async with front.db.org(front.org_id) as con:
        await con.execute(
            "insert into membership (org_id, user_id, role, added_by) values ($1, $2, $3, 'test')",
            front.org_id,
            user_id,
            role,
        )


async def post(client: Client, path: str, **body: Any) -> httpx2.Response:
    return await client.post(f"/v1/{path}", json=body)


async def signed_in(client: Client, password: str, email: str = EMAIL) -> dict[str, Any]:
    response = await post(client, "auth/sign-in", email=email, password=password)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def platform_audit(front: Front) -> list[str]:
    async with front.db.globals() as con:
        rows = await con.fetch("select action from platform_audit order by at")
    return [row["action"] for row in rows]


@pytest.fixture
async def nobody(front: Front) -> Client:
    return await front.client(token="")


async def test_right_password_gives_tokens_that_work(
    front: Front, nobody: Client, password: str
) -> None:
    user_id = await made(front, password)
    await seat(front, user_id)
    answer = await signed_in(nobody, password, "  Ann@POND.example ")
    assert answer["token_type"] == "Bearer"
    assert answer["expires_in"] == 900
    assert answer["refresh_token"].startswith("mpr_")
    assert answer["user"]["id"] == str(user_id)
    assert [one["role"] for one in answer["organizations"]] == ["builder"]
    caller = await front.client(token=answer["access_token"])
    assert (await caller.get("/v1/runs")).status_code == 200
    me = (await caller.get("/v1/me")).json()
    assert me["user"]["email"] == EMAIL
    assert me["organization"] == front.org_id
    assert "runs:start" in me["permissions"]
    assert "members:write" not in me["permissions"]
    assert await platform_audit(front) == ["account.created", "session.started"]


async def test_wrong_password_unknown_address_and_disabled_account_look_the_same(
    front: Front, nobody: Client, password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await made(front, password)
    await made(front, password, "off@pond.example")
    async with front.db.globals() as con:
        await con.execute("update account set disabled_at = now() where email like 'off@%'")
    computed: list[str] = []
    verify: Callable[..., bool] = Passwords._verify

    def counted(self: Passwords, stored: str, text: str) -> bool:
        computed.append(stored.rsplit("$", 2)[0])
        return verify(self, stored, text)

    monkeypatch.setattr(Passwords, "_verify", counted)
    answers = []
    for email, tried in (
        (EMAIL, "wrong"),
        ("nobody@pond.example", password),
        ("off@pond.example", password),
        ("not an address", password),
    ):
        response = await post(nobody, "auth/sign-in", email=email, password=tried)
        body = {**response.json(), "request_id": ""}
        headers = {
            name: value
            for name, value in response.headers.items()
            if name not in ("date", "x-request-id")
        }
        answers.append((response.status_code, body, headers))
    assert answers[0][0] == 401
    assert all(one == answers[0] for one in answers)
    # The costly part is done each time, with the same parameters.
    assert len(computed) == 4
    assert len(set(computed)) == 1


async def test_refresh_rotates_and_the_old_token_ends_the_session(
    front: Front, nobody: Client, password: str
) -> None:
    await made(front, password)
    first = await signed_in(nobody, password)
    second = (await post(nobody, "auth/refresh", refresh_token=first["refresh_token"])).json()
    assert second["session_id"] == first["session_id"]
    assert second["refresh_token"] != first["refresh_token"]
    caller = await front.client(token=second["access_token"])
    assert (await caller.get("/v1/me")).status_code == 200

    stolen = await post(nobody, "auth/refresh", refresh_token=first["refresh_token"])
    assert (stolen.status_code, stolen.json()["code"]) == (401, "refresh_invalid")
    # The thief's session is the owner's: both are out, from the next request on.
    refused = await caller.get("/v1/me")
    assert (refused.status_code, refused.json()["code"]) == (401, "token_stale")
    again = await post(nobody, "auth/refresh", refresh_token=second["refresh_token"])
    assert again.status_code == 401
    assert "refresh.reused" in await platform_audit(front)


async def test_of_many_refreshes_at_once_one_succeeds_and_the_session_ends(
    front: Front, nobody: Client, password: str
) -> None:
    await made(front, password)
    first = await signed_in(nobody, password)
    answers = await asyncio.gather(
        *(post(nobody, "auth/refresh", refresh_token=first["refresh_token"]) for _ in range(8))
    )
    statuses = sorted(one.status_code for one in answers)
    assert statuses == [200, *[401] * 7]
    (good,) = (one.json() for one in answers if one.status_code == 200)
    after = await post(nobody, "auth/refresh", refresh_token=good["refresh_token"])
    assert after.status_code == 401


async def test_idle_and_old_sessions_are_not_renewed(
    front: Front, nobody: Client, password: str
) -> None:
    await made(front, password)
    idle = await signed_in(nobody, password)
    old = await signed_in(nobody, password)
    async with front.db.globals() as con:
        await con.execute(
            "update refresh_token set expires_at = now() where session_id = $1", idle["session_id"]
        )
        await con.execute(
            "update login_session set expires_at = now() where session_id = $1", old["session_id"]
        )
    for one in (idle, old):
        refused = await post(nobody, "auth/refresh", refresh_token=one["refresh_token"])
        assert refused.status_code == 401
    caller = await front.client(token=old["access_token"])
    assert (await caller.get("/v1/me")).status_code == 401


async def test_sign_out_ends_the_session_and_an_unknown_token_is_no_error(
    front: Front, nobody: Client, password: str
) -> None:
    user_id = await made(front, password)
    await seat(front, user_id)
    answer = await signed_in(nobody, password)
    caller = await front.client(token=answer["access_token"])
    assert (await caller.get("/v1/runs")).status_code == 200
    out = await post(nobody, "auth/sign-out", refresh_token=answer["refresh_token"])
    assert out.status_code == 204
    assert (await caller.get("/v1/runs")).json()["code"] == "token_stale"
    for _ in range(2):
        again = await post(nobody, "auth/sign-out", refresh_token=answer["refresh_token"])
        assert again.status_code == 204
    assert (await post(nobody, "auth/sign-out", refresh_token="mpr_x")).status_code == 204


async def test_sessions_are_listed_and_one_of_another_person_does_not_exist(
    front: Front, nobody: Client, password: str
) -> None:
    await made(front, password)
    await made(front, password, "bob@pond.example")
    phone, laptop = await signed_in(nobody, password), await signed_in(nobody, password)
    bob = await signed_in(nobody, password, "bob@pond.example")
    caller = await front.client(token=laptop["access_token"])
    listed = (await caller.get("/v1/me/sessions")).json()["data"]
    assert [(one["id"], one["is_current"]) for one in listed] == [
        (laptop["session_id"], True),
        (phone["session_id"], False),
    ]
    assert listed[0]["address"] == "127.0.0.1"
    stranger = await front.client(token=bob["access_token"])
    refused = await stranger.delete(f"/v1/me/sessions/{phone['session_id']}")
    unknown = await stranger.delete(f"/v1/me/sessions/{uuid.uuid4()}")
    assert refused.status_code == unknown.status_code == 404
    other = await front.client(token=phone["access_token"])
    assert (await other.get("/v1/me")).status_code == 200
    assert (await caller.delete(f"/v1/me/sessions/{phone['session_id']}")).status_code == 204
    assert (await other.get("/v1/me")).status_code == 401
    assert len((await caller.get("/v1/me/sessions")).json()["data"]) == 1


async def test_tries_are_limited_for_the_pair_of_address_and_account_alone(
    front: Front, nobody: Client, password: str
) -> None:
    await made(front, password)
    await made(front, password, "bob@pond.example")
    tries = [
        post(nobody, "auth/sign-in", email=EMAIL, password="wrong") for _ in range(PAIR.tries + 6)
    ]
    answers = await asyncio.gather(*tries)
    assert sorted(one.status_code for one in answers) == [401] * PAIR.tries + [429] * 6
    refused = await post(nobody, "auth/sign-in", email=EMAIL, password=password)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 61
    assert refused.json()["code"] == "rate_limited"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    await signed_in(nobody, password, "bob@pond.example")
    unknown = [
        await post(nobody, "auth/sign-in", email="who@pond.example", password="wrong")
        for _ in range(PAIR.tries + 1)
    ]
    assert [one.status_code for one in unknown] == [401] * PAIR.tries + [429]


async def test_being_right_gives_the_tries_back(
    front: Front, nobody: Client, password: str
) -> None:
    await made(front, password)
    for _ in range(2):
        for _ in range(PAIR.tries - 1):
            wrong = await post(nobody, "auth/sign-in", email=EMAIL, password="wrong")
            assert wrong.status_code == 401
        await signed_in(nobody, password)


async def test_hash_of_older_parameters_is_replaced_when_its_owner_signs_in(
    front: Front, nobody: Client, password: str
) -> None:
    older = Passwords(memory_kib=128, rounds=2)
    hashed = await older.hash(password)
    async with front.db.globals() as con:
        await create_account(con, EMAIL, "Ann", hashed)
    await signed_in(nobody, password)
    async with front.db.globals() as con:
        stored = await con.fetchval("select password_hash from account")
    assert "m=64,t=1" in stored
    await signed_in(nobody, password)


async def test_new_password_ends_the_other_sessions_and_keeps_this_one(
    front: Front, nobody: Client, password: str
) -> None:
    await made(front, password)
    here, there = await signed_in(nobody, password), await signed_in(nobody, password)
    caller = await front.client(token=here["access_token"])
    new = f"another one {uuid.uuid4()}"
    wrong = await post(caller, "me/password", old_password="wrong", new_password=new)
    assert (wrong.status_code, wrong.json()["code"]) == (403, "password_wrong")
    short = await post(caller, "me/password", old_password=password, new_password="short")
    assert (short.status_code, short.json()["code"]) == (422, "password_length")
    changed = await post(caller, "me/password", old_password=password, new_password=new)
    assert changed.status_code == 200
    assert changed.json()["session_id"] == here["session_id"]
    # What was signed before is refused; what came with the answer works.
    assert (await caller.get("/v1/me")).json()["code"] == "token_stale"
    again = await front.client(token=changed.json()["access_token"])
    assert (await again.get("/v1/me")).status_code == 200
    elsewhere = await post(nobody, "auth/refresh", refresh_token=there["refresh_token"])
    assert elsewhere.status_code == 401
    assert (await post(nobody, "auth/sign-in", email=EMAIL, password=password)).status_code == 401
    await signed_in(nobody, new)
    assert "password.changed" in await platform_audit(front)


async def test_person_in_several_orgs_says_which_and_one_in_none_has_only_themselves(
    front: Front, nobody: Client, password: str, other_org: int
) -> None:
    user_id = await made(front, password)
    alone = await front.client(token=(await signed_in(nobody, password))["access_token"])
    me = (await alone.get("/v1/me")).json()
    assert (me["organization"], me["permissions"], me["organizations"]) == (None, [], [])
    assert (await alone.get("/v1/runs")).status_code == 403
    await seat(front, user_id)
    async with front.db.org(other_org) as con:
        await con.execute(
            "insert into membership (org_id, user_id, role, added_by) values ($1, $2, $3, 'test')",
            other_org,
            user_id,
            "viewer",
        )
    both = await front.client(token=(await signed_in(nobody, password))["access_token"])
    assert (await both.get("/v1/me")).json()["organization"] is None
    there = await both.get("/v1/me", headers={"X-Organization-Id": "marsh"})
    assert (there.json()["organization"], there.json()["role"]) == (other_org, "viewer")
    nowhere = await both.get("/v1/me", headers={"X-Organization-Id": "nowhere"})
    assert (nowhere.status_code, nowhere.json()["code"]) == (403, "org_forbidden")
    assert (await both.get("/v1/runs")).json()["code"] == "org_needed"
    headers = {"X-Organization-Id": str(other_org)}
    assert (await both.get("/v1/runs", headers=headers)).status_code == 200


async def test_name_is_changed_and_nothing_else_can_be(
    front: Front, nobody: Client, password: str
) -> None:
    await made(front, password)
    caller = await front.client(token=(await signed_in(nobody, password))["access_token"])
    changed = await caller.patch("/v1/me", json={"name": "Ann B."})
    assert changed.json()["user"]["name"] == "Ann B."
    for field in ("is_operator", "email", "id", "org_id", "role"):
        refused = await caller.patch("/v1/me", json={"name": "x", field: "x"})
        assert refused.status_code == 422, field


async def test_token_made_on_the_machine_is_told_what_it_is_and_is_nobody(ann: Client) -> None:
    me = (await ann.get("/v1/me")).json()
    assert me["user"] is None
    assert me["subject"] == "user:ann"
    refused = await ann.get("/v1/me/sessions")
    assert (refused.status_code, refused.json()["code"]) == (403, "session_needed")


async def test_no_password_and_no_token_is_stored_as_it_is(
    front: Front, nobody: Client, password: str, admin_url: str
) -> None:
    import asyncpg

    await made(front, password)
    answer = await signed_in(nobody, password)
    admin = await asyncpg.connect(admin_url, server_settings={"search_path": "millpond"})
    try:
        tables = await admin.fetch("select tablename from pg_tables where schemaname = 'millpond'")
        text = ""
        for row in tables:
            rows = await admin.fetch(f"select t::text from {row['tablename']} t")
            text += "".join(one[0] for one in rows)
    finally:
        await admin.close()
    assert answer["session_id"] in text
    for secret in (password, answer["refresh_token"], answer["access_token"]):
        assert secret not in text
        assert secret.encode().hex() not in text
    assert "argon2id" in text


async def test_no_renewal_survives_a_change_of_the_password_at_the_same_time(front: Front) -> None:
    nobody = await front.client(token="")
    words = [f"a pass phrase {uuid.uuid4()}" for _ in range(6)]
    await made(front, words[0])
    for old, new in pairwise(words):
        held = await signed_in(nobody, old)
        caller = await front.client(token=held["access_token"])
        changed, _ = await asyncio.gather(
            caller.post("/v1/me/password", json={"old_password": old, "new_password": new}),
            post(nobody, "auth/refresh", refresh_token=held["refresh_token"]),
        )
        assert changed.status_code == 200, changed.text
        async with front.db.globals() as con:
            good = await con.fetchval(
                "select count(*) from refresh_token where session_id = $1 and used_at is null",
                held["session_id"],
            )
        assert good == 1
