"""Mail that waits to be sent: stored sealed in the transaction of its reason, sent by a loop of the API process.

`post` is called by the rooms that write mails, `Postman` is run by `cli`. Invariants: nobody's request waits for a mail
server; a mail goes out at least once unless it is refused or grows too old, and its text is in no log.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

import orjson
import structlog

from millpond.db.pool import Connection, Database
from millpond.db.queries import queries
from millpond.errors import MillpondError, Permanent, Transient
from millpond.identity.ring import KeyRing
from millpond.types import new_id

PURPOSE = "mail_outbox"
_SQL = queries("people")
_log = structlog.get_logger("millpond.mail")
# Longer than any mailer takes for one mail: nobody else takes it meanwhile.
_CLAIM_S = 120.0
_POLL_S = 2.0
_SWEEP_S = 600.0
_FIRST_DELAY_S = 2.0
_LAST_DELAY_S = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Mail:
    """One mail; its id is part of its `Message-ID`, so that a mail sent twice is seen to be one."""

    to: str
    subject: str
    text: str
    mail_id: uuid.UUID | None = None


class Mailer(Protocol):
    """Sends mail; raises Transient for what may work later, Permanent for what will not."""

    async def send(self, mail: Mail) -> None:
        """Send one mail; returns once somebody else is answerable for it."""
        ...


async def post(con: Connection, ring: KeyRing, mail: Mail, *, ttl_s: float) -> None:
    """Let a mail wait to be sent, for `ttl_s` at most; it is sent if the transaction commits."""
    mail_id = new_id()
    plain = orjson.dumps([mail.to, mail.subject, mail.text])
    seal = await ring.current(con)
    sealed = seal.seal(plain, PURPOSE, str(mail_id))
    await con.execute(_SQL["add_mail"], mail_id, seal.key_id, sealed, float(ttl_s))


class Outbox:
    """Posts what rooms that know no seal write."""

    def __init__(self, ring: KeyRing, *, ttl_s: float) -> None:
        self._ring = ring
        self._ttl_s = ttl_s

    async def invite(self, con: Connection, to: str, subject: str, text: str) -> None:
        """Let an invitation wait to be sent; it is sent if the transaction commits."""
        await post(con, self._ring, Mail(to=to, subject=subject, text=text), ttl_s=self._ttl_s)


class Postman:
    """Sends what waits, one mail after the other; several processes share the work."""

    def __init__(
        self,
        db: Database,
        ring: KeyRing,
        mailer: Mailer | None,
        *,
        poll_s: float = _POLL_S,
        first_delay_s: float = _FIRST_DELAY_S,
    ) -> None:
        self._db = db
        self._ring = ring
        self._mailer = mailer
        self._poll_s = poll_s
        self._first_delay_s = first_delay_s

    async def run(self) -> None:
        """Send and sweep until cancelled; without a mailer, only sweep."""
        loop = asyncio.get_running_loop()
        sweep_at = loop.time()
        while True:
            try:
                if loop.time() >= sweep_at:
                    await self._sweep()
                    sweep_at = loop.time() + _SWEEP_S
                while self._mailer is not None and await self.send_one(self._mailer):
                    pass
            except MillpondError as error:
                _log.warning("mail.halted", code=error.code)
            except Exception as error:  # noqa: BLE001 - a top-level loop: other mails go on
                _log.error("mail.halted", code="unexpected", error=type(error).__name__)
            await asyncio.sleep(self._poll_s)

    async def send_one(self, mailer: Mailer) -> bool:
        """Send the mail that is due longest; False when none is due."""
        async with self._db.globals() as con:
            row = await con.fetchrow(_SQL["claim_mail"], _CLAIM_S)
        if row is None:
            return False
        mail_id = uuid.UUID(int=row["mail_id"].int)
        if row["is_too_old"]:
            if row["tries"] > 1:
                _log.warning("mail.given_up", mail_id=str(mail_id), tries=row["tries"])
            await self._drop(mail_id)
            return True
        try:
            await mailer.send(self._opened(mail_id, row["sealed"], row["seal_key_id"]))
        except Transient as error:
            delay_s = min(_LAST_DELAY_S, self._first_delay_s * 2.0 ** (row["tries"] - 1))
            _log.warning("mail.postponed", mail_id=str(mail_id), code=error.code, delay_s=delay_s)
            async with self._db.globals() as con:
                await con.execute(_SQL["postpone_mail"], mail_id, delay_s)
        except Permanent as error:
            _log.warning("mail.refused", mail_id=str(mail_id), code=error.code)
            await self._drop(mail_id)
        else:
            await self._drop(mail_id)
        return True

    def _opened(self, mail_id: uuid.UUID, sealed: bytes, key_id: str) -> Mail:
        plain = self._ring.open_or_wait(sealed, key_id, PURPOSE, str(mail_id))
        to, subject, text = orjson.loads(plain)
        return Mail(to=to, subject=subject, text=text, mail_id=mail_id)

    async def _drop(self, mail_id: uuid.UUID) -> None:
        async with self._db.globals() as con:
            await con.execute(_SQL["drop_mail"], mail_id)

    async def _sweep(self) -> None:
        async with self._db.globals() as con:
            await con.execute(_SQL["sweep"])


@contextlib.asynccontextmanager
async def delivering(postman: Postman) -> AsyncIterator[None]:
    """Let a postman work until the block ends."""
    working = asyncio.create_task(postman.run(), name="postman")
    try:
        yield
    finally:
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await working
