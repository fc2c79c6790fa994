"""Invitations over HTTP: bound to an address, good once, and never more than the inviter may give."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from tests.security.conftest import Person, World, embedder, front, world

from millpond.db.pool import Connection
from millpond.identity.invitations import Mail

from .conftest import Client

__all__ = ["embedder", "front", "world"]

ACCEPT = "/v1/auth/invitations/accept"
URL = "/v1/invitations"


class Letters:
    """An outbox that keeps what it is given, in the transaction's hands or not."""

    def __init__(self) -> None:
        self.texts: dict[str, list[str]] = {}

    async def invite(self, con: Connection, to: str, subject: str, text: str) -> None:
        self.texts.setdefault(to, []).append(text)

    def token(self, to: str) -> str:
        (found,) = re.findall(r"mpi_\w+", self.texts[to][-1])
        return str(found)


@pytest.fixture
def letters(world: World) -> Letters:
    """What was mailed."""
    kept = Letters()
    # Ports are frozen for routes; a test puts its own outbox in before anything is sent.
    object.__setattr__(world.front.app.state.ports, "mail", Mail(outbox=kept))
    return kept


async def invited(caller: Client, person: Person, role: str = "viewer") -> dict[str, Any]:
    response = await caller.post(URL, json={"email": person.email, "role": role})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    return made


async def refusal(client: Client, token: str) -> tuple[int, str]:
    response = await client.post(ACCEPT, json={"token": token})
    return response.status_code, response.json().get("code", "")


async def test_an_invitation_gives_its_role_once(world: World, letters: Letters) -> None:
    boss, ann = await world.owner_of(world.org_id), await world.person()
    made = await invited(boss, ann, "builder")
    caller = await world.client(ann)
    token = letters.token(ann.email)
    joined = await caller.post(ACCEPT, json={"token": token})
    assert (joined.status_code, joined.json()["role"]) == (200, "builder")
    assert joined.json()["organization_id"] == world.org_id
    assert await refusal(caller, token) == (404, "invitation_refused")
    shown = (await boss.get(f"{URL}/{made['id']}")).json()
    assert (shown["state"], shown["accepted_by"]) == ("accepted", ann.subject)
    member = (await boss.get(f"/v1/members/{ann.user_id}")).json()
    assert (member["role"], member["email"]) == ("builder", ann.email)
    audited = await world.owner.fetch("select action from audit where subject = $1", ann.subject)
    assert [row["action"] for row in audited] == ["invitation.accepted"]


async def test_of_two_acceptances_at_once_one_succeeds(world: World, letters: Letters) -> None:
    boss, ann = await world.owner_of(world.org_id), await world.person()
    await invited(boss, ann)
    token = letters.token(ann.email)
    clients = [await world.client(ann) for _ in range(4)]
    answers = await asyncio.gather(*(refusal(client, token) for client in clients))
    assert sorted(status for status, _ in answers) == [200, 404, 404, 404]
    assert await world.count("membership", user_id=ann.user_id) == 1


async def test_a_token_is_good_for_nobody_else_and_says_so_to_nobody(
    world: World, letters: Letters
) -> None:
    boss, ann = await world.owner_of(world.org_id), await world.person()
    await invited(boss, ann)
    token = letters.token(ann.email)
    bob = await world.client(await world.person())
    org, prefix, secret = token.split("_")[1:]
    other = await world.owner_of(world.other_id)
    for text in (
        token,  # another's
        f"mpi_{org}_{prefix}_{secret[:-1]}{'0' if secret[-1] != '0' else '1'}",
        f"mpi_zzz_{prefix}_{secret}",
        f"mpk_{org}_{prefix}_{secret}",
        "x",
    ):
        assert await refusal(bob, text) == (404, "invitation_refused")
    assert await refusal(other, token) == (404, "invitation_refused")
    assert await refusal(await world.client(ann), token) == (200, "")


async def test_a_token_that_was_revoked_resent_or_expired_is_refused(
    world: World, letters: Letters
) -> None:
    boss, ann = await world.owner_of(world.org_id), await world.person()
    caller = await world.client(ann)
    made = await invited(boss, ann)
    first = letters.token(ann.email)
    assert (await boss.post(f"{URL}/{made['id']}/resend")).status_code == 200
    assert await refusal(caller, first) == (404, "invitation_refused")
    await invited(boss, ann)  # takes the place of the former
    assert (await boss.get(f"{URL}/{made['id']}")).json()["state"] == "revoked"
    assert (await boss.post(f"{URL}/{made['id']}/resend")).status_code == 409
    (open_one,) = (await boss.get(URL, params={"state": "open"})).json()["data"]
    await world.owner.execute("update invitation set expires_at = now() where revoked_at is null")
    assert await refusal(caller, letters.token(ann.email)) == (404, "invitation_refused")
    assert (await boss.get(f"{URL}/{open_one['id']}")).json()["state"] == "expired"
    last = await invited(boss, ann)
    assert (await boss.delete(f"{URL}/{last['id']}")).status_code == 204
    assert await refusal(caller, letters.token(ann.email)) == (404, "invitation_refused")
    assert await world.count("membership", user_id=ann.user_id) == 0


@pytest.mark.parametrize("change", ["role", "removal", "disabled"])
async def test_an_inviter_who_may_no_longer_give_the_role_gives_nothing(
    world: World, letters: Letters, change: str
) -> None:
    inviter, ann = await world.member("admin"), await world.person()
    await invited(await world.client(inviter), ann, "admin")
    statement = {
        "role": "update membership set role = 'viewer' where user_id = $1",
        "removal": "delete from membership where user_id = $1",
        "disabled": "update account set disabled_at = now() where user_id = $1",
    }[change]
    await world.owner.execute(statement, inviter.user_id)
    caller = await world.client(ann)
    assert await refusal(caller, letters.token(ann.email)) == (403, "inviter_rights")
    assert await world.count("membership", user_id=ann.user_id) == 0


async def test_an_invitation_by_a_key_ends_with_the_key(world: World, letters: Letters) -> None:
    boss, ann = await world.owner_of(world.org_id), await world.person()
    scopes = sorted(set((await boss.get("/v1/roles")).json()["permissions"]))
    key = (await boss.post("/v1/api-keys", json={"name": "k", "scopes": scopes})).json()
    await invited(await world.front.client(token=key["key"]), ann)
    await boss.delete(f"/v1/api-keys/{key['id']}")
    caller = await world.client(ann)
    assert await refusal(caller, letters.token(ann.email)) == (403, "inviter_rights")


async def test_the_policy_says_which_addresses_join(world: World, letters: Letters) -> None:
    boss, ann = await world.owner_of(world.org_id), await world.person()
    await invited(boss, ann)
    policy = {"email_domains": ["@Acme.example"], "invitation_days": 1}
    changed = (await boss.patch("/v1/org", json={"policy": policy})).json()
    assert changed["policy"]["email_domains"] == ["acme.example"]
    caller = await world.client(ann)
    assert await refusal(caller, letters.token(ann.email)) == (422, "email_domain")
    wish = {"email": "z@evil-acme.example", "role": "viewer"}
    assert (await boss.post(URL, json=wish)).json()["code"] == "email_domain"
    good = await boss.post(URL, json={"email": "Z@ACME.example ", "role": "viewer"})
    assert (good.status_code, good.json()["email"]) == (201, "z@acme.example")


async def test_a_members_address_is_told_only_to_those_who_see_members(
    world: World, letters: Letters
) -> None:
    ann = await world.member("viewer")
    wish = {"email": ann.email, "role": "roleless"}
    await world.owner.execute(
        "insert into custom_role (org_id, role, permissions) values ($1, 'roleless', '{}')",
        world.org_id,
    )
    admin = await world.client(await world.member("admin"))
    blind = await world.client(await world.member({"members:write"}))
    told = await admin.post(URL, json=wish)
    assert (told.status_code, told.json()["code"]) == (409, "already_member")
    assert (await blind.post(URL, json=wish)).status_code == 201
    caller = await world.client(ann)
    assert await refusal(caller, letters.token(ann.email)) == (409, "already_member")
    assert (await admin.get(f"/v1/members/{ann.user_id}")).json()["role"] == "viewer"


async def test_who_comes_back_is_not_served_what_was_signed_before(
    world: World, letters: Letters
) -> None:
    boss, ann = await world.owner_of(world.org_id), await world.member("admin")
    before = await world.client(ann)
    assert (await boss.delete(f"/v1/members/{ann.user_id}")).status_code == 204
    await invited(boss, ann)
    assert await refusal(before, letters.token(ann.email)) == (200, "")
    stale = await before.get("/v1/members")
    assert (stale.status_code, stale.json()["code"]) == (401, "token_stale")


async def test_an_operators_invitation_makes_the_first_owner(
    world: World, letters: Letters
) -> None:
    person, ann = await world.person(is_operator=True), await world.person()
    operator = await world.client(person)
    wish = {"slug": "acme", "name": "Acme", "owner_email": ann.email}
    made = (await operator.post("/v1/platform/orgs", json=wish)).json()
    assert made["invitation"]["role"] == "owner"
    caller = await world.client(ann)
    assert await refusal(caller, letters.token(ann.email)) == (200, "")
    assert await world.count("membership", org_id=made["id"], role="owner") == 1
    taken = await operator.post("/v1/platform/orgs", json=wish)
    assert (taken.status_code, taken.json()["code"]) == (409, "slug_taken")
    number = await operator.post("/v1/platform/orgs", json={"slug": "12", "name": "x"})
    assert number.status_code == 422


async def test_an_invitation_by_who_is_no_operator_any_more_makes_no_owner(
    world: World, letters: Letters
) -> None:
    person, ann = await world.person(is_operator=True), await world.person()
    wish = {"slug": "acme", "name": "Acme", "owner_email": ann.email}
    operator = await world.client(person)
    assert (await operator.post("/v1/platform/orgs", json=wish)).status_code == 201
    await world.owner.execute("update account set is_operator = false")
    caller = await world.client(ann)
    assert await refusal(caller, letters.token(ann.email)) == (403, "inviter_rights")


async def test_an_invitation_makes_no_account_that_it_would_not_let_in(
    world: World, letters: Letters
) -> None:
    boss = await world.owner_of(world.org_id)
    people = world.front.app.state.ports.people
    object.__setattr__(people, "registration", "invited")
    assert (
        await boss.post(URL, json={"email": "new@x.example", "role": "viewer"})
    ).status_code == 201
    nobody = await world.front.client(token="")
    body = {"token": letters.token("new@x.example"), "password": "a pass phrase of the test"}
    await world.owner.execute("update org set suspended_at = now(), suspended_reason = 'x'")
    refused = await nobody.post("/v1/auth/register/confirm", json=body)
    assert (refused.status_code, refused.json()["code"]) == (403, "org_suspended")
    await world.owner.execute("update org set suspended_at = null, suspended_reason = null")
    assert (await nobody.post("/v1/auth/register/confirm", json=body)).status_code == 201


@pytest.mark.parametrize("email", ["_@[.!", "x,boss@corp.example", "evil<boss@corp.example>"])
async def test_what_mail_programs_read_otherwise_is_no_address(world: World, email: str) -> None:
    boss = await world.owner_of(world.org_id)
    response = await boss.post(URL, json={"email": email, "role": "viewer"})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "email")
