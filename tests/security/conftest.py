"""An API with two orgs, and people seated in them as the product seats them: account, session, membership."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest
from tests.api.conftest import Client, Front, embedder, front

from millpond.identity.passport import Passport, Seat
from millpond.identity.permissions import ROLES
from millpond.types import new_id

__all__ = ["embedder", "front"]


@dataclass
class Person:
    """Somebody with an account and a session; `seats` are their places in orgs."""

    user_id: uuid.UUID
    session_id: uuid.UUID
    email: str
    seats: list[Seat] = field(default_factory=list)
    is_operator: bool = False

    @property
    def subject(self) -> str:
        return f"user:{self.user_id}"

    def passport(self) -> Passport:
        return Passport(
            subject=self.subject,
            session_id=self.session_id,
            stamp=1,
            seats=self.seats,
            is_operator=self.is_operator,
        )


@dataclass
class World:
    """The API, its owner's connection, and two orgs: what is asked for is in `org_id`."""

    front: Front
    owner: asyncpg.Connection
    org_id: int
    other_id: int
    slugs: dict[int, str]

    async def person(self, *, is_operator: bool = False) -> Person:
        """Make somebody who is in no org."""
        person = Person(new_id(), new_id(), f"{uuid.uuid4().hex}@x.example", [], is_operator)
        await self.owner.execute(
            "insert into account (user_id, email, is_operator) values ($1, $2, $3)",
            person.user_id,
            person.email,
            is_operator,
        )
        await self.owner.execute(
            "insert into login_session (session_id, user_id, expires_at) "
            "values ($1, $2, now() + interval '1 hour')",
            person.session_id,
            person.user_id,
        )
        return person

    async def member(self, role: str | Collection[str], *, org_id: int | None = None) -> Person:
        """Make somebody seated in an org by a built-in role or by a custom one of these permissions."""
        org_id = org_id or self.org_id
        person = await self.person()
        custom = None if isinstance(role, str) else sorted(role)
        name = role if isinstance(role, str) else f"custom-{uuid.uuid4().hex[:12]}"
        if custom is not None:
            await self.owner.execute(
                "insert into custom_role (org_id, role, permissions) values ($1, $2, $3)",
                org_id,
                name,
                custom,
            )
        await self.owner.execute(
            "insert into membership (org_id, user_id, role, added_by) values ($1, $2, $3, 'test')",
            org_id,
            person.user_id,
            name,
        )
        person.seats = [
            Seat(
                org_id=org_id,
                slug=self.slugs[org_id],
                role=name,
                stamp=1,
                custom=None if custom is None else frozenset(custom),
            )
        ]
        return person

    def token(self, person: Person, ttl_s: float = 600) -> str:
        """Sign what the product would sign for somebody who is signed in."""
        return self.front.keyring.mint_access(person.passport(), ttl_s)

    async def client(self, person: Person | None) -> Client:
        """Open a client of somebody, or of nobody."""
        return await self.front.client(token="" if person is None else self.token(person))

    async def owner_of(self, org_id: int) -> Client:
        """Open a client of an owner of an org."""
        return await self.client(await self.member("owner", org_id=org_id))

    async def count(self, table: str, **where: Any) -> int:
        """Count rows as the owner sees them."""
        words = " and ".join(f"{name} = ${nth}" for nth, name in enumerate(where, 1)) or "true"
        number: int = await self.owner.fetchval(
            f"select count(*) from {table} where {words}", *where.values()
        )
        return number


@pytest.fixture
async def world(front: Front, org: int, other_org: int, admin_url: str) -> AsyncIterator[World]:
    """Two orgs on one API."""
    owner = await asyncpg.connect(admin_url, server_settings={"search_path": "millpond"})
    try:
        rows = await owner.fetch("select org_id, slug from org")
        slugs = {row["org_id"]: row["slug"] for row in rows}
        yield World(front, owner, org, other_org, slugs)
    finally:
        await owner.close()


def weakest_without(permission: str) -> str | frozenset[str]:
    """Return the most powerful role that lacks a permission: built in, else all others of an org."""
    for role, permissions in ROLES.items():
        if permission not in permissions:
            return role
    return ROLES["owner"] - {permission}
