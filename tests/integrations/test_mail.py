"""Mail through a real SMTP server on loopback: delivered once, kept while the server is down, given up when refused."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiosmtpd.smtp import SMTP, AuthResult, Envelope

from millpond.db.pool import Database
from millpond.errors import InvalidInput, Permanent, Transient
from millpond.identity.addresses import parse_address
from millpond.identity.mailing import Mail, Postman, delivering, post
from millpond.identity.ring import KeyRing
from millpond.identity.seal import Seal
from millpond.integrations.mail import FileMailer, SmtpMailer, SmtpServer, message_of

REFUSED = "nobody@example.org"


class Box:
    """Takes mail as an aiosmtpd handler, and says when one arrived or was refused."""

    def __init__(self) -> None:
        self.mails: list[Any] = []
        self.arrived = asyncio.Event()
        self.refused = 0

    async def handle_RCPT(
        self, server: Any, session: Any, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if address == REFUSED:
            self.refused += 1
            return "550 no such mailbox"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Envelope) -> str:
        content = envelope.content
        assert isinstance(content, bytes)
        self.mails.append(message_from_bytes(content, policy=policy.default))
        self.arrived.set()
        return "250 OK"


@asynccontextmanager
async def smtp(box: Box, port: int, **options: Any) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(box, **options), "127.0.0.1", port)
    try:
        yield
    finally:
        server.close()
        await server.wait_closed()


@pytest.fixture
def port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free: int = taken.getsockname()[1]
    return free


@pytest.fixture
def seal() -> KeyRing:
    return KeyRing(Seal(secrets.token_bytes(32)))


def mailer(port: int, login: str = "") -> SmtpMailer:
    url = f"smtp+plain://{login}127.0.0.1:{port}"
    return SmtpMailer(SmtpServer.of_url(url), "millpond@example.org", timeout_s=5)


async def put(db: Database, seal: KeyRing, to: str = "ann@example.org") -> None:
    async with db.globals() as con:
        await post(con, seal, Mail(to=to, subject="Hello", text="A text."), ttl_s=600)


async def waiting(db: Database) -> int:
    async with db.globals() as con:
        return int(await con.fetchval("select count(*) from mail_outbox"))


async def until_empty(db: Database) -> None:
    async with asyncio.timeout(20):
        while await waiting(db):
            await asyncio.sleep(0.02)


async def test_two_postmen_deliver_a_mail_once(db: Database, seal: KeyRing, port: int) -> None:
    box = Box()
    await put(db, seal)
    async with smtp(box, port):
        one, other = (Postman(db, seal, mailer(port), poll_s=0.02) for _ in range(2))
        async with delivering(one), delivering(other):
            await until_empty(db)
    assert [mail["To"] for mail in box.mails] == ["ann@example.org"]
    assert box.mails[0].get_content().strip() == "A text."


async def test_mail_waits_for_a_server_that_is_down(db: Database, seal: KeyRing, port: int) -> None:
    box = Box()
    await put(db, seal)
    with structlog.testing.capture_logs() as logs:
        postman = Postman(db, seal, mailer(port), poll_s=0.02, first_delay_s=0.02)
        assert await postman.send_one(mailer(port))
        assert [one["event"] for one in logs] == ["mail.postponed"]
        assert await waiting(db) == 1
        async with smtp(box, port), delivering(postman):
            await until_empty(db)
    assert len(box.mails) == 1


async def test_refused_address_is_given_up_and_told_without_the_address(
    db: Database, seal: KeyRing, port: int
) -> None:
    box = Box()
    await put(db, seal, REFUSED)
    async with smtp(box, port):
        with structlog.testing.capture_logs() as logs:
            assert await Postman(db, seal, None).send_one(mailer(port))
    assert (box.refused, box.mails, await waiting(db)) == (1, [], 0)
    assert [(one["event"], one["code"]) for one in logs] == [("mail.refused", "mail_refused")]
    assert REFUSED not in str(logs)


async def test_login_is_made_and_a_wrong_one_is_tried_again_later(port: int) -> None:
    box, password = Box(), secrets.token_hex(8)

    def check(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        return AuthResult(success=data.password == password.encode(), handled=False)

    mail = Mail(to="ann@example.org", subject="Hello", text="A text.")
    options = {"authenticator": check, "auth_required": True, "auth_require_tls": False}
    async with smtp(box, port, **options):
        with pytest.raises(Transient) as refused:
            await mailer(port, "me:wrong@").send(mail)
        assert refused.value.code == "mail_login"
        await mailer(port, f"me:{password}@").send(mail)
    assert len(box.mails) == 1


ODD = [
    "_@[.!",
    "x,boss@corp.example",
    "evil<boss@corp.example>",
    "g:boss@corp.example;",
    "=?utf-8?q?a?=@corp.example",
    "a@b.example\r\nBcc: c@d.example",
]
# The standard library's parser of addresses fails at these.
UNREADABLE = {"_@[.!"}


@pytest.mark.parametrize("text", ODD)
def test_what_is_no_plain_address_is_refused_where_it_is_given(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_address(text)


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("part", ["to", "subject"])
def test_no_text_makes_a_header_or_ends_the_mailer(text: str, part: str) -> None:
    parts = {"to": "a@b.example", "subject": "plain", part: text}
    mail = Mail(text="body", **parts)
    if "=?" in text or "\n" in text or (part == "to" and text in UNREADABLE):
        with pytest.raises(Permanent):
            message_of(mail, "millpond@x.example")
        return
    message = message_of(mail, "millpond@x.example")
    found = message_from_bytes(message.as_bytes())
    assert found.keys() == message.keys()
    assert "Bcc" not in found
    assert found.get_payload() == "body\n"


def test_an_encoded_word_cannot_bring_a_header_of_its_own() -> None:
    name = "=?utf-8?q?X=0D=0AContent-Type:_text/html=0D=0A=0D=0A<a>Sign_in</a>?="
    with pytest.raises(Permanent):
        message_of(Mail(to="a@b.example", subject=name, text="body"), "millpond@x.example")


async def test_a_mailer_that_fails_unexpectedly_does_not_keep_other_mail(
    db: Database, seal: KeyRing
) -> None:
    sent = asyncio.Event()

    class Odd:
        async def send(self, mail: Mail) -> None:
            if mail.to == "first@x.example":
                raise AttributeError("as a parser of headers may")
            sent.set()

    async with db.globals() as con:
        for to in ("first@x.example", "second@x.example"):
            await post(con, seal, Mail(to=to, subject="s", text="t"), ttl_s=60)
    async with delivering(Postman(db, seal, Odd(), poll_s=0.01)):
        await asyncio.wait_for(sent.wait(), 20)


async def test_a_link_in_mail_that_is_written_to_a_file_can_be_copied(tmp_path: Path) -> None:
    link = f"https://pond.example/invitation#token=mpi_{'2' * 90}"
    mail = Mail(to="ann@example.org", subject="Hello", text=f"Grüße. Open:\n\n{link}\n")
    written = FileMailer(tmp_path / "mail.txt")
    for _ in range(2):
        await written.send(mail)
    text = (tmp_path / "mail.txt").read_text(encoding="utf-8")
    assert text.splitlines().count(link) == 2
    assert text.count("\nTo: ann@example.org\n") == 2
    assert "Grüße" in text
    assert (tmp_path / "mail.txt").stat().st_mode & 0o077 == 0
