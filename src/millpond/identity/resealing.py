"""Resealing: turns an installation to another key and seals everything anew with it, in batches.

Called by `millpond secrets rotate-key`. Invariants: from the turn on nothing is sealed with an older key; each
batch is a transaction of its own, so that whoever goes on after a kill does what is left; an older key is told to
be empty only after nothing that it sealed was found in any table.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from millpond.db.pool import Connection, Database
from millpond.db.queries import queries
from millpond.errors import Permanent
from millpond.identity import audit
from millpond.identity.audit_sealer import orgs
from millpond.identity.mailing import PURPOSE as MAIL
from millpond.identity.ring import KeyRing
from millpond.identity.seal import Seal
from millpond.identity.secret_store import bound_to
from millpond.identity.signing import PURPOSE as SIGNING_KEY
from millpond.types import NO_ORG, Principal

_SQL = queries("seal_keys")
_HOST = Principal(org_id=NO_ORG, subject="host")
_BATCH = 100


@dataclass(kw_only=True)
class Resealed:
    """What a rotation did: how many values of which kind; `broken` are those that do not open.

    `old_key_ids` are the keys that are needed no more, but for backups of before.
    """

    key_id: str
    counts: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    old_key_ids: list[str] = field(default_factory=list)


class _Kind(NamedTuple):
    """Rows of one kind in one scope: how they are read and stored, and the words that bind each."""

    name: str
    open: Callable[[], AbstractAsyncContextManager[Connection]]
    old: str
    store: str
    words: Callable[[str], tuple[str, ...]]
    first: tuple[object, ...] = ()


async def rotate(
    db: Database,
    ring: KeyRing,
    *,
    told: Callable[[str, int], None] = lambda kind, count: None,
) -> Resealed:
    """Let the ring's newest key seal from now on, and seal with it what older ones sealed.

    `told` hears of each batch. Raises Permanent where an older key is not at hand.
    """
    new = ring.newest
    await _turn(db, ring, new)
    report = Resealed(key_id=new.key_id)
    async for kind in _kinds(db):
        await _reseal(kind, ring, new, report, told)
    if not report.broken:
        report.old_key_ids = await _empty(db, new)
    return report


async def _turn(db: Database, ring: KeyRing, new: Seal) -> None:
    """Make a key the current one, once nobody seals with another."""
    async with db.globals() as con:
        await con.execute(_SQL["lock"])
        _insist(ring, new)
        rows = await con.fetch(_SQL["keys"])
        for row in rows:
            if row["emptied_at"] is None and not ring.has(row["key_id"]):
                raise Permanent(
                    f"installation key {row['key_id']} still has to open what it sealed, and is not here",
                    code="seal_key_mismatch",
                    advice="name it in MILLPOND_OLD_SECRET_KEYS, or as a further line of the key file",
                )
        if any(row["is_current"] and row["key_id"] == new.key_id for row in rows):
            return
        await ring.current(con)  # with it, keys of audit logs that are gone but kept
        await con.execute(_SQL["retire"])
        await con.execute(_SQL["add"], new.key_id)
        for row in rows:
            if (key_id := row["key_id"]) != new.key_id:
                sealed = ring.sealed_audit_key(key_id, new)
                await con.execute(_SQL["keep_audit_key"], key_id, sealed, new.key_id)
        await audit.record(con, _HOST, "seal_key.rotated", f"seal_key:{new.key_id}")


def _insist(ring: KeyRing, new: Seal) -> None:
    """Raise Permanent where the new key is not kept: what it seals would be lost with this process."""
    ring.reread()
    if new.key_id not in ring.key_ids:
        raise Permanent(
            f"the new key {new.key_id} is not in this host's key file any more",
            code="seal_key_mismatch",
            advice="run this again, and put no older copy of the key file in its place meanwhile",
        )


async def _kinds(db: Database) -> AsyncIterator[_Kind]:
    """Yield every kind of sealed rows, those of orgs org by org."""
    yield _Kind(
        "signing keys",
        db.globals,
        "old_signing_keys",
        "reseal_signing_key",
        lambda kid: (SIGNING_KEY, kid),
    )
    yield _Kind(
        "waiting mail", db.globals, "old_mails", "reseal_mail", lambda mail_id: (MAIL, mail_id)
    )
    async for org_id, _ in orgs(db):
        yield _Kind(
            "secrets",
            partial(db.org, org_id),
            "old_secrets",
            "reseal_secret",
            partial(bound_to, org_id),
            (org_id,),
        )


async def _reseal(
    kind: _Kind, ring: KeyRing, new: Seal, report: Resealed, told: Callable[[str, int], None]
) -> None:
    """Seal rows of one kind anew, batch after batch, by their ids."""
    last = ""
    while True:
        async with kind.open() as con:
            rows = await con.fetch(_SQL[kind.old], *kind.first, new.key_id, last, _BATCH)
            count = 0
            for row in rows:
                words = kind.words(row["id"])
                try:
                    plain = ring.open(row["sealed"], row["seal_key_id"], *words)
                except Permanent:
                    report.broken.append(":".join(words))
                    continue
                sealed = new.seal(plain, *words)
                await con.execute(_SQL[kind.store], *kind.first, row["id"], sealed, new.key_id)
                count += 1
        if count:
            report.counts[kind.name] = report.counts.get(kind.name, 0) + count
            told(kind.name, report.counts[kind.name])
        if len(rows) < _BATCH:
            return
        last = rows[-1]["id"]


async def _empty(db: Database, new: Seal) -> list[str]:
    """Note that the older keys are needed no more; returns all of them that ever sealed here."""
    async with db.globals() as con:
        rows = await con.fetch(_SQL["keys"])
        old = [row["key_id"] for row in rows if row["key_id"] != new.key_id]
        emptied = await con.fetch(_SQL["emptied"], old)
        for row in emptied:
            await audit.record(con, _HOST, "seal_key.emptied", f"seal_key:{row['key_id']}")
    return old
