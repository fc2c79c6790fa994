"""Somebody in hundreds of orgs: the token stays short, and the seat in the org that is named is looked up."""

from __future__ import annotations

import uuid

import jwt
import pytest

from .conftest import Client, Front
from .test_sign_in import EMAIL, made, signed_in

ORGS = 500
PASSWORD = f"a long one {uuid.uuid4()}"
HEADER = "X-Organization-Id"


async def seated_in(front: Front, user_id: uuid.UUID, count: int) -> dict[str, int]:
    """Make orgs with somebody as a viewer in each; returns their ids by slug."""
    orgs = {}
    for nth in range(count):
        async with front.db.globals() as con:
            slug = f"pond-number-{nth}"
            org_id: int = await con.fetchval(
                "insert into org (slug, name) values ($1, $1) returning org_id", slug
            )
        async with front.db.org(org_id) as con:
            await con.execute(
                "insert into membership (org_id, user_id, role, added_by) values ($1, $2, 'viewer', 'test')",
                org_id,
                user_id,
            )
        orgs[slug] = org_id
    return orgs


def claims_of(token: str) -> dict[str, object]:
    claims: dict[str, object] = jwt.decode(token, options={"verify_signature": False})
    return claims


@pytest.fixture
async def nobody(front: Front) -> Client:
    return await front.client(token="")


async def test_somebody_in_500_orgs_works_in_each_and_in_no_other(
    front: Front, nobody: Client
) -> None:
    user_id = await made(front, PASSWORD)
    orgs = await seated_in(front, user_id, ORGS)
    answer = await signed_in(nobody, PASSWORD)
    assert len(answer["organizations"]) == ORGS
    assert len(answer["access_token"]) < 1000
    caller = await front.client(token=answer["access_token"])
    assert (await caller.get("/v1/me")).status_code == 200
    unnamed = await caller.get("/v1/runs")
    assert (unnamed.status_code, unnamed.json()["code"]) == (422, "org_needed")
    for slug in (next(iter(orgs)), f"pond-number-{ORGS - 1}"):
        for name in (slug, str(orgs[slug])):
            shown = await caller.get("/v1/org", headers={HEADER: name})
            assert (shown.status_code, shown.json()["slug"]) == (200, slug)
    for elsewhere in (str(front.org_id), "never-made", "0"):
        refused = await caller.get("/v1/runs", headers={HEADER: elsewhere})
        assert (refused.status_code, refused.json()["code"]) == (403, "org_forbidden")

    place = {HEADER: "pond-number-7"}
    async with front.db.org(orgs["pond-number-7"]) as con:
        await con.execute(
            "update membership set role = 'owner', version = version + 1 where user_id = $1",
            user_id,
        )
    assert (await caller.get("/v1/api-keys", headers=place)).status_code == 200
    async with front.db.org(orgs["pond-number-7"]) as con:
        await con.execute("delete from membership where user_id = $1", user_id)
    assert (await caller.get("/v1/runs", headers=place)).status_code == 403
    async with front.db.globals() as con:
        await con.execute("update login_session set revoked_at = now(), revoked_why = 'test'")
    ended = await caller.get("/v1/runs", headers={HEADER: "pond-number-8"})
    assert (ended.status_code, ended.json()["code"]) == (401, "token_stale")


async def test_a_token_with_room_for_its_seats_carries_them(front: Front, nobody: Client) -> None:
    user_id = await made(front, PASSWORD)
    await seated_in(front, user_id, 40)
    token = (await signed_in(nobody, PASSWORD, EMAIL))["access_token"]
    claims = claims_of(token)
    assert "many" not in claims
    assert len(claims["orgs"]) == 40  # type: ignore[arg-type]
    assert len(token) <= 6144
