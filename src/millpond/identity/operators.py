"""The first operator of the platform: by a link that works once, made by whoever has the database.

Called by `millpond operator` and `millpond up` (links) and by the route that takes them. Invariants: at most one link
works at a time; a plain one only while there is no operator; two at once make one operator.
"""

from __future__ import annotations

import uuid

from millpond.db.pool import Database
from millpond.db.queries import queries
from millpond.errors import Conflict
from millpond.identity import audit, sessions
from millpond.identity.addresses import parse_address
from millpond.identity.brake import ADDRESS, brake, key_of
from millpond.identity.passwords import check_password
from millpond.identity.people import People
from millpond.identity.sessions import Device, person
from millpond.identity.single_use import issue, spend
from millpond.types import NO_ORG, Principal, new_id

_SQL = queries("people")
LINK_S = 3_600.0
# Whoever makes a link has the database: no account stands behind it.
MACHINE = Principal(org_id=NO_ORG, subject="machine:database")


async def make_link(db: Database, *, is_reset: bool = False, is_renewal: bool = True) -> str | None:
    """Return a new token for an operator; earlier ones no longer work.

    Without `is_reset`, raises Conflict when there is an operator. Without `is_renewal`, returns None where there is
    an operator or a link that works.
    """
    async with db.globals() as con:
        await con.execute(_SQL["lock_operators"])
        has_one = bool(await con.fetchval(_SQL["has_operator"]))
        if not is_renewal and (has_one or await con.fetchval(_SQL["has_operator_token"])):
            return None
        if has_one and not is_reset:
            raise _exists()
        await con.execute(_SQL["drop_operator_tokens"])
        token = await issue(con, "operator_reset" if is_reset else "operator", LINK_S)
        action = "operator.reset_link_made" if is_reset else "operator.link_made"
        await audit.record(con, MACHINE, action, "platform:operators")
    return token


async def claim(
    people: People, token: str, email: str, name: str, password: str, device: Device
) -> uuid.UUID:
    """Make the operator of a link: a new account, or that of the address with a new password.

    Raises InvalidInput for a link or a password that is not good, Conflict when there is an operator meanwhile.
    """
    await brake(people.db, (key_of("operator", device.address), ADDRESS))
    email = parse_address(email)
    check_password(password, email)
    hashed = await people.passwords.hash(password)
    async with people.db.globals() as con:
        await con.execute(_SQL["lock_operators"])
        spent = await spend(con, token, "operator", "operator_reset")
        if spent.purpose == "operator" and await con.fetchval(_SQL["has_operator"]):
            raise _exists()
        user_id = await con.fetchval(_SQL["make_operator"], email, hashed, name)
        if user_id is None:
            user_id = await con.fetchval(_SQL["add_operator"], new_id(), email, name, hashed)
        else:
            await sessions.revoke_others(con, user_id, None, "password_reset", device)
        assert user_id is not None
        await audit.record(
            con,
            person(user_id),
            "operator.created",
            f"user:{user_id}",
            details={"by": spent.purpose},
            address=device.address,
        )
    return uuid.UUID(int=user_id.int)


def _exists() -> Conflict:
    return Conflict(
        "The platform has an operator.",
        code="operator_exists",
        advice="`millpond operator reset` makes a link all the same",
    )
