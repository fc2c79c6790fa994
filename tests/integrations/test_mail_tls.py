"""Mail over TLS, with an authority of its own: what is not proven gets neither the password nor the mail."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import secrets
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiosmtpd.smtp import SMTP, AuthResult
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from millpond.db.pool import Database
from millpond.errors import Transient
from millpond.identity.mailing import Mail, Postman
from millpond.identity.ring import KeyRing
from millpond.identity.seal import Seal
from millpond.integrations.mail import SmtpMailer, SmtpServer

from .test_mail import Box, put, waiting

MAIL = Mail(to="ann@example.org", subject="Hello", text="A text.")
SCHEMES = ["smtp", "smtps"]


@dataclass
class Authority:
    """Signs certificates for servers."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls, name: str) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = _certificate(subject, subject, key, days=1)
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        return cls(key, made.sign(key, hashes.SHA256()))

    def serves(self, folder: Path, address: str = "127.0.0.1", *, days: int = 1) -> ssl.SSLContext:
        """Return what a server at an address proves itself with; it has ended where `days` are negative."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, address)])
        made = _certificate(subject, self.certificate.subject, key, days=days)
        place = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        signed = made.add_extension(place, critical=False).sign(self.key, hashes.SHA256())
        pem = serialization.Encoding.PEM
        file = folder / f"{secrets.token_hex(4)}.pem"
        file.write_bytes(
            signed.public_bytes(pem)
            + key.private_bytes(
                pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def trusted(self) -> ssl.SSLContext:
        """Return what a client checks servers with that trusts this authority alone."""
        text = self.certificate.public_bytes(serialization.Encoding.PEM).decode()
        return ssl.create_default_context(cadata=text)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=3))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


class Server(Box):
    """A mail server that notes who logged in, and whether that was under TLS."""

    def __init__(self) -> None:
        super().__init__()
        self.password = secrets.token_hex(12)
        self.logins: list[bool] = []
        self.were_under_tls: list[bool] = []

    def check(self, server: Any, session: Any, *rest: Any) -> AuthResult:
        self.logins.append(rest[-1].password == self.password.encode())
        return AuthResult(success=self.logins[-1], handled=False)

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.were_under_tls.append(server.transport.get_extra_info("ssl_object") is not None)
        return await super().handle_DATA(server, session, envelope)

    @asynccontextmanager
    async def listening(self, scheme: str, proof: ssl.SSLContext) -> AsyncIterator[int]:
        """Serve with STARTTLS, or TLS from the first byte; yields the port."""
        is_implicit = scheme == "smtps"
        options: dict[str, Any] = {"authenticator": self.check, "auth_required": True}
        if is_implicit:
            options["auth_require_tls"] = False  # it does not see that all of it is
        else:
            options |= {"tls_context": proof, "require_starttls": True}
        server = await asyncio.get_running_loop().create_server(
            lambda: SMTP(self, **options), "127.0.0.1", 0, ssl=proof if is_implicit else None
        )
        async with server:
            yield server.sockets[0].getsockname()[1]


def mailer(scheme: str, port: int, password: str, trust: ssl.SSLContext) -> SmtpMailer:
    server = SmtpServer.of_url(f"{scheme}://me:{password}@127.0.0.1:{port}")
    return SmtpMailer(server, "millpond@example.org", timeout_s=3, trust=trust)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.make("authority of the test")


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_mail_goes_over_tls_to_a_server_that_proves_itself(
    scheme: str, authority: Authority, tmp_path: Path
) -> None:
    server = Server()
    async with server.listening(scheme, authority.serves(tmp_path)) as port:
        await mailer(scheme, port, server.password, authority.trusted()).send(MAIL)
        with pytest.raises(Transient) as refused:
            await mailer(scheme, port, "wrong", authority.trusted()).send(MAIL)
    assert refused.value.code == "mail_login"
    assert server.logins[0]
    assert set(server.logins[1:]) == {False}
    assert server.were_under_tls == [True]
    assert [mail["To"] for mail in server.mails] == [MAIL.to]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("wrong", ["unknown", "elsewhere", "ended", "default"])
async def test_a_server_that_does_not_prove_itself_gets_neither_password_nor_mail(
    scheme: str, wrong: str, authority: Authority, tmp_path: Path
) -> None:
    server, trust = Server(), authority.trusted()
    proof = authority.serves(tmp_path)
    if wrong == "unknown":
        proof = Authority.make("authority of the test").serves(tmp_path)
    elif wrong == "elsewhere":
        proof = authority.serves(tmp_path, "127.0.0.2")
    elif wrong == "ended":
        proof = authority.serves(tmp_path, days=-1)
    else:
        trust = ssl.create_default_context()  # what the product trusts where nothing is said
    async with server.listening(scheme, proof) as port:
        with pytest.raises(Transient) as refused:
            await mailer(scheme, port, server.password, trust).send(MAIL)
    assert refused.value.code == "mail_tls"
    assert server.password not in str(refused.value)
    assert (server.logins, server.mails) == ([], [])


@pytest.mark.parametrize(
    "answer", [b"502 what?\r\n", b"454 not now\r\n", b"220 go\r\n250 AUTH PLAIN LOGIN\r\n"]
)
@pytest.mark.parametrize("is_offered", [True, False])
async def test_without_starttls_nothing_is_said(
    answer: bytes, is_offered: bool, authority: Authority
) -> None:
    """Somebody on the way who hides STARTTLS, or answers it, hears no password and no address."""
    heard: list[bytes] = []
    password = secrets.token_hex(12)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mx\r\n")
        while line := await reader.readline():
            heard.append(line)
            if line.upper().startswith(b"EHLO"):
                offered = b"250-STARTTLS\r\n" if is_offered else b""
                writer.write(b"250-mx\r\n" + offered + b"250 AUTH PLAIN LOGIN\r\n")
            elif line.upper().startswith(b"STARTTLS"):
                writer.write(answer)
            else:
                writer.write(b"250 OK\r\n")
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(Transient) as refused:
            await mailer("smtp", port, password, authority.trusted()).send(MAIL)
    assert refused.value.code in ("mail_tls", "mail_server")
    said = b"".join(heard).upper()
    assert b"AUTH" not in said
    assert b"MAIL FROM" not in said
    assert b"ANN@" not in said
    assert password.encode() not in b"".join(heard)


async def test_mail_waits_for_a_certificate_to_be_mended_and_the_log_says_what_is_wrong(
    db: Database, authority: Authority, tmp_path: Path
) -> None:
    server, seal = Server(), KeyRing(Seal(secrets.token_bytes(32)))
    await put(db, seal)
    async with server.listening("smtp", authority.serves(tmp_path, days=-1)) as port:
        sender = mailer("smtp", port, server.password, authority.trusted())
        with structlog.testing.capture_logs() as logs:
            assert await Postman(db, seal, sender, first_delay_s=0.01).send_one(sender)
    assert [(one["event"], one["code"]) for one in logs] == [("mail.postponed", "mail_tls")]
    assert server.password not in str(logs)
    assert await waiting(db) == 1
