"""What the matrix asks of routes that need no permission: public ones, and those about whoever is signed in.

A route of `PUBLIC` or `SIGNED_IN` without an entry here fails the matrix. Each entry makes a request that succeeds, one
that names what is somebody else's, and one that names nothing: the last two have one answer.
"""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
from tests.api.conftest import Client, quick_passwords
from tests.api.test_links import collected, token_in
from tests.security.conftest import Person, World
from tests.security.things import SOME_ID

from millpond.db.pool import Connection
from millpond.identity import operators
from millpond.identity.invitations import Mail

PASSWORD = "a pass phrase of one's own"
NEW_PASSWORD = "another pass phrase of one's own"
# No two people have it, so that an answer that holds it shows somebody.
MARK = "Marwood"


@dataclass
class Ask:
    """A request: its path filled in, and what it carries."""

    path: dict[str, str] = field(default_factory=dict)
    json: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Entry:
    """`good` succeeds, with `status`; `others` is about somebody else's, `unknown` about nothing.

    `shows` are texts that the good answer has to hold, so that what it does not hold proves something.
    """

    good: Ask
    status: int = 200
    others: Ask | None = None
    unknown: Ask | None = None
    shows: tuple[str, ...] = ()


@dataclass
class Street:
    """Two people with accounts and passwords, each in an org of their own; `other` is nobody's business."""

    world: World
    nobody: Client
    me: Person
    other: Person
    client: Client
    letters: list[tuple[str, str]]
    others_client: Client

    async def others_secrets(self) -> list[str]:
        """What of the other person no answer to anybody else may hold."""
        rows = await self.world.owner.fetch(
            "select session_id from login_session where user_id = $1", self.other.user_id
        )
        return [
            MARK,
            self.other.email,
            str(self.other.user_id),
            *(str(row["session_id"]) for row in rows),
            f'"{self.world.slugs[self.world.other_id]}"',
        ]

    def invitation(self, to: str) -> str:
        """The token of the newest invitation to an address."""
        text = [text for who, text in self.letters if who == to][-1]
        return str(re.findall(r"mpi_\w+", text)[0])


class Letters(list[tuple[str, str]]):
    """An outbox that keeps what it is given."""

    async def invite(self, con: Connection, to: str, subject: str, text: str) -> None:
        self.append((to, text))


async def street(world: World) -> Street:
    """Make the two people, with open registration."""
    ports = world.front.app.state.ports
    letters = Letters()
    people = replace(ports.people, registration="open")
    world.front.app.state.ports = replace(ports, people=people, mail=Mail(outbox=letters))
    hashed = await quick_passwords().hash(PASSWORD)
    me = await world.member("builder", org_id=world.org_id)
    other = await world.member("builder", org_id=world.other_id)
    await world.owner.execute("update account set password_hash = $1", hashed)
    await world.owner.execute(
        "update account set name = $1 where user_id = $2", MARK, other.user_id
    )
    return Street(
        world,
        await world.client(None),
        me,
        other,
        await world.client(me),
        letters,
        await world.client(other),
    )


async def answered(client: Client, path: str, **body: Any) -> dict[str, Any]:
    response: httpx2.Response = await client.post(path, json=body)
    assert response.status_code < 300, response.text
    answer: dict[str, Any] = response.json() if response.content else {}
    return answer


Make = Callable[[Street], Awaitable[Entry]]
PUBLIC_ENTRIES: dict[tuple[str, str], Make] = {}
SIGNED_IN_ENTRIES: dict[tuple[str, str], Make] = {}


def entry(table: dict[tuple[str, str], Make], *routes: str) -> Callable[[Make], Make]:
    """Register what makes the entry of routes such as `GET /v1/me`."""

    def keep(make: Make) -> Make:
        for route in routes:
            method, _, path = route.partition(" ")
            table[method, path] = make
        return make

    return keep


@entry(PUBLIC_ENTRIES, "GET /healthz", "GET /readyz")
async def health(at: Street) -> Entry:
    return Entry(Ask(), shows=('"ok"',))


@entry(PUBLIC_ENTRIES, "GET /openapi.json")
async def description(at: Street) -> Entry:
    return Entry(Ask(), shows=('"paths"',))


@entry(PUBLIC_ENTRIES, "GET /.well-known/jwks.json")
async def key_set(at: Street) -> Entry:
    return Entry(Ask(), shows=('"OKP"',))


@entry(PUBLIC_ENTRIES, "POST /v1/auth/sign-in")
async def signing_in(at: Street) -> Entry:
    return Entry(
        Ask(json={"email": at.me.email, "password": PASSWORD}),
        others=Ask(json={"email": at.other.email, "password": NEW_PASSWORD}),
        unknown=Ask(json={"email": "nobody@x.example", "password": NEW_PASSWORD}),
        shows=(at.me.email,),
    )


async def refresh_token_of(at: Street, person: Person) -> str:
    token: str = (
        await answered(at.nobody, "/v1/auth/sign-in", email=person.email, password=PASSWORD)
    )["refresh_token"]
    return token


async def ended_refresh_token_of(at: Street, person: Person) -> str:
    token = await refresh_token_of(at, person)
    await answered(at.nobody, "/v1/auth/sign-out", refresh_token=token)
    return token


@entry(PUBLIC_ENTRIES, "POST /v1/auth/refresh")
async def renewing(at: Street) -> Entry:
    return Entry(
        Ask(json={"refresh_token": await refresh_token_of(at, at.me)}),
        others=Ask(json={"refresh_token": await ended_refresh_token_of(at, at.other)}),
        unknown=Ask(json={"refresh_token": "mpr_never-made"}),
        shows=(at.me.email,),
    )


@entry(PUBLIC_ENTRIES, "POST /v1/auth/sign-out")
async def signing_out(at: Street) -> Entry:
    return Entry(
        Ask(json={"refresh_token": await refresh_token_of(at, at.me)}),
        status=204,
        others=Ask(json={"refresh_token": f"mpr_{at.other.session_id}"}),
        unknown=Ask(json={"refresh_token": "mpr_never-made"}),
    )


@entry(PUBLIC_ENTRIES, "POST /v1/auth/register")
async def registering(at: Street) -> Entry:
    return Entry(
        Ask(json={"email": "new@x.example"}),
        status=202,
        others=Ask(json={"email": at.other.email}),
        unknown=Ask(json={"email": "nobody@x.example"}),
    )


@entry(PUBLIC_ENTRIES, "POST /v1/auth/password-reset")
async def forgetting(at: Street) -> Entry:
    return Entry(
        Ask(json={"email": at.me.email}),
        status=202,
        others=Ask(json={"email": at.other.email}),
        unknown=Ask(json={"email": "nobody@x.example"}),
    )


async def link_to(at: Street, path: str, email: str) -> str:
    """Ask for a mailed link, and return its token."""
    await answered(at.nobody, path, email=email)
    (mail,) = await collected(at.world.front)
    assert mail.to == email
    return token_in(mail)


@entry(PUBLIC_ENTRIES, "POST /v1/auth/register/confirm")
async def confirming(at: Street) -> Entry:
    mine = await link_to(at, "/v1/auth/register", "new@x.example")
    others = await link_to(at, "/v1/auth/password-reset", at.other.email)
    return Entry(
        Ask(json={"token": mine, "password": PASSWORD}),
        status=201,
        others=Ask(json={"token": others, "password": NEW_PASSWORD}),
        unknown=Ask(json={"token": "mpl_never-made", "password": NEW_PASSWORD}),
    )


@entry(PUBLIC_ENTRIES, "POST /v1/auth/password-reset/confirm")
async def resetting(at: Street) -> Entry:
    mine = await link_to(at, "/v1/auth/password-reset", at.me.email)
    others = await link_to(at, "/v1/auth/register", "others@x.example")
    return Entry(
        Ask(json={"token": mine, "password": NEW_PASSWORD}),
        status=204,
        others=Ask(json={"token": others, "password": NEW_PASSWORD}),
        unknown=Ask(json={"token": "mpl_never-made", "password": NEW_PASSWORD}),
    )


@entry(PUBLIC_ENTRIES, "POST /v1/auth/operator")
async def claiming(at: Street) -> Entry:
    token = await operators.make_link(at.world.front.db)
    others = await link_to(at, "/v1/auth/password-reset", at.other.email)
    who = {"email": "op@x.example", "password": PASSWORD}
    return Entry(
        Ask(json={"token": token, **who}),
        status=201,
        others=Ask(json={"token": others, **who}),
        unknown=Ask(json={"token": "mpl_never-made", **who}),
    )


@entry(SIGNED_IN_ENTRIES, "GET /v1/me", "GET /v1/me/sessions")
async def oneself(at: Street) -> Entry:
    there = {"X-Organization-Id": str(at.world.other_id)}
    # Sessions that can be renewed are listed.
    for person in (at.me, at.other):
        await at.world.owner.execute(
            "insert into refresh_token (digest, session_id, expires_at) values ($1, $2, now() + interval '1 hour')",
            secrets.token_bytes(32),
            person.session_id,
        )
    return Entry(
        Ask(),
        others=Ask(headers=there),
        unknown=Ask(headers={"X-Organization-Id": "424242"}),
        shows=(str(at.me.session_id),),
    )


@entry(SIGNED_IN_ENTRIES, "PATCH /v1/me")
async def renaming(at: Street) -> Entry:
    body = {"name": "A name of one's own"}
    return Entry(
        Ask(json=body),
        others=Ask(json={**body, "user_id": str(at.other.user_id)}),
        unknown=Ask(json={**body, "user_id": SOME_ID}),
        shows=("A name of one's own",),
    )


@entry(SIGNED_IN_ENTRIES, "DELETE /v1/me/sessions/{session_id}")
async def ending(at: Street) -> Entry:
    await refresh_token_of(at, at.me)  # another session, so that this one goes on
    mine = await at.world.owner.fetchval(
        "select session_id from login_session where user_id = $1 and session_id <> $2",
        at.me.user_id,
        at.me.session_id,
    )
    return Entry(
        Ask(path={"session_id": str(mine)}),
        status=204,
        others=Ask(path={"session_id": str(at.other.session_id)}),
        unknown=Ask(path={"session_id": SOME_ID}),
    )


@entry(SIGNED_IN_ENTRIES, "POST /v1/me/password")
async def changing_password(at: Street) -> Entry:
    others = f"the other's {uuid.uuid4()}"
    await at.world.owner.execute(
        "update account set password_hash = $1 where user_id = $2",
        await quick_passwords().hash(others),
        at.other.user_id,
    )
    return Entry(
        Ask(json={"old_password": PASSWORD, "new_password": NEW_PASSWORD}),
        others=Ask(json={"old_password": others, "new_password": NEW_PASSWORD}),
        unknown=Ask(json={"old_password": f"{others}?", "new_password": NEW_PASSWORD}),
        shows=(str(at.me.session_id),),
    )


@entry(SIGNED_IN_ENTRIES, "POST /v1/auth/invitations/accept")
async def accepting(at: Street) -> Entry:
    third = await at.world.owner.fetchval(
        "insert into org (slug, name) values ('third', 'Third') returning org_id"
    )
    at.world.slugs[third] = "third"
    boss = await at.world.owner_of(third)
    for person in (at.me, at.other):
        await answered(boss, "/v1/invitations", email=person.email, role="viewer")
    return Entry(
        Ask(json={"token": at.invitation(at.me.email)}),
        others=Ask(json={"token": at.invitation(at.other.email)}),
        unknown=Ask(json={"token": f"mpi_{third}_{'0' * 43}"}),
        shows=('"third"',),
    )
