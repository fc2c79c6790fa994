"""The key ring: the installation's key with older ones, of which the database says which one seals.

Made by `cli`; used by every room that seals or opens. Invariants: what is sealed in a transaction is sealed with
the key that is current when it commits, also while keys are rotated; a host without the current key of its
database seals nothing in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from millpond.db.pool import Connection, Database, Record
from millpond.db.queries import queries
from millpond.errors import Permanent, Transient
from millpond.identity.audit_chain import PURPOSE as AUDIT
from millpond.identity.seal import Seal

_SQL = queries("seal_keys")
_KEPT = "seal_key"


class KeyRing:
    """One host's keys; `read` reads them again where they may have changed since, such as from a file."""

    def __init__(self, *seals: Seal, read: Callable[[], Sequence[Seal]] | None = None) -> None:
        self._read = read
        self._seals: dict[str, Seal] = {}
        self._kept: dict[str, bytes] = {}
        self._take(seals)
        self._current = self.newest

    def __repr__(self) -> str:
        """Return the ids of the keys only."""
        return f"KeyRing({', '.join(self._seals)})"

    @property
    def key_id(self) -> str:
        """The id of the key that seals, as far as this process has heard."""
        return self._current.key_id

    @property
    def key_ids(self) -> list[str]:
        """The ids of all keys at hand, the newest first."""
        return list(self._seals)

    async def current(self, con: Connection) -> Seal:
        """Return the key to seal with in this transaction, which a rotation waits for.

        Raises Permanent on a host that does not have it. The first key of a database is made the current one.
        """
        await con.execute(_SQL["lock_shared"])
        rows = await con.fetch(_SQL["keys"])
        if not any(row["is_current"] for row in rows):
            await con.execute(_SQL["add_first"], self.newest.key_id)
            rows = await con.fetch(_SQL["keys"])
        self._current = self._known(next(row["key_id"] for row in rows if row["is_current"]))
        self._keep(rows)
        return self._current

    async def keep(self, db: Database) -> None:
        """Keep what chained audit logs under keys that are gone, as far as this host's keys open it."""
        async with db.globals() as con:
            self._keep(await con.fetch(_SQL["keys"]))

    async def check(self, db: Database) -> None:
        """Raise Permanent where the database holds what this host's keys do not open."""
        async with db.globals() as con:
            await self.current(con)
            for row in await con.fetch(_SQL["keys"]):
                if row["emptied_at"] is None:
                    self._known(row["key_id"])

    def open(self, sealed: bytes, key_id: str, *associated: str) -> bytes:
        """Open what key `key_id` sealed; raises Permanent without it, or where it does not open."""
        return self._known(key_id).open(sealed, *associated)

    def open_or_wait(self, sealed: bytes, key_id: str, *associated: str) -> bytes:
        """As `open`, for work that can wait until this host has been given the key: raises Transient without it."""
        try:
            key = self._known(key_id)
        except Permanent as error:
            raise Transient(
                error.message, code=error.code, advice=error.advice, details=error.details
            ) from error
        return key.open(sealed, *associated)

    def derive(self, purpose: str, key_id: str) -> bytes:
        """Return a key for one purpose, as `Seal.derive`; of keys that are gone, that of the audit log is kept."""
        if purpose == AUDIT and key_id in self._kept and key_id not in self._seals:
            return self._kept[key_id]
        return self._known(key_id).derive(purpose, key_id)

    def sealed_audit_key(self, key_id: str, by: Seal) -> bytes:
        """Return what chained audit logs under key `key_id`, sealed by another key."""
        return by.seal(self.derive(AUDIT, key_id), _KEPT, key_id)

    @property
    def newest(self) -> Seal:
        """The key that a rotation goes to."""
        return next(iter(self._seals.values()))

    def has(self, key_id: str) -> bool:
        """Whether a key is at hand, looking again where it is not."""
        if key_id not in self._seals:
            self.reread()
        return key_id in self._seals

    def reread(self) -> None:
        """Read the keys again, where they are read from somewhere."""
        if self._read is not None:
            self._take(self._read())

    def _take(self, seals: Sequence[Seal]) -> None:
        self._seals = {seal.key_id: seal for seal in seals}

    def _known(self, key_id: str) -> Seal:
        if not self.has(key_id):
            raise Permanent(
                f"this database holds what installation key {key_id} sealed, and this host has "
                f"{', '.join(self._seals)}",
                code="seal_key_mismatch",
                advice="give this host the MILLPOND_SECRET_KEY (or key file) that the other hosts have",
                details={"seal_key_id": key_id},
            )
        return self._seals[key_id]

    def _keep(self, rows: Sequence[Record]) -> None:
        for row in rows:
            key_id, by = row["key_id"], row["audit_sealed_by"]
            if by is not None and key_id not in self._kept and self.has(by):
                self._kept[key_id] = self.open(row["audit_sealed"], by, _KEPT, key_id)
