"""Mail out: by SMTP, or, in development, into a file that only its owner reads.

Opened by `cli`. Invariant: a connection lives for one mail and no longer than its timeout; what the server says goes
into no message, since it may repeat the address or the text.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from dataclasses import dataclass
from email import message_from_bytes
from email.message import EmailMessage
from email.utils import formatdate
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import aiosmtplib

from millpond.errors import InvalidInput, Permanent, Transient
from millpond.identity.mailing import Mail

Security = Literal["none", "starttls", "tls"]
_PORTS: dict[Security, int] = {"none": 25, "starttls": 587, "tls": 465}
_SECURITY: dict[str, Security] = {"smtp": "starttls", "smtps": "tls", "smtp+plain": "none"}
_OF_ENCODING = frozenset({"Content-Type", "Content-Transfer-Encoding", "MIME-Version"})
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, kw_only=True, slots=True)
class SmtpServer:
    """Where mail is handed in; `repr` leaves the password out."""

    host: str
    port: int
    security: Security
    user: str | None
    password: str | None

    def __repr__(self) -> str:
        """Return it without its user and password."""
        return f"SmtpServer({self.host}:{self.port}, {self.security})"

    @classmethod
    def of_url(cls, url: str) -> SmtpServer:
        """Read `smtp://` (STARTTLS), `smtps://` (TLS) or, on this machine only, `smtp+plain://user:password@host:port`."""
        try:
            parts = urlsplit(url)
            security, host, port = _SECURITY[parts.scheme], parts.hostname, parts.port
        except (ValueError, KeyError) as error:
            raise _malformed("it is not smtp://, smtps:// or smtp+plain://") from error
        if not host:
            raise _malformed("it names no host")
        if security == "none" and host not in _LOOPBACK:
            raise _malformed("smtp+plain:// is for this machine only")
        return cls(
            host=host,
            port=port or _PORTS[security],
            security=security,
            user=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
        )


class SmtpMailer:
    """Hands mail to an SMTP server; `sender` is the address that it is from."""

    def __init__(
        self,
        server: SmtpServer,
        sender: str,
        *,
        timeout_s: float = 20.0,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self._server = server
        self._sender = sender
        self._timeout_s = timeout_s
        self._trust = trust or ssl.create_default_context()

    async def send(self, mail: Mail) -> None:
        """Send one mail; raises Transient or Permanent as the server's answer says."""
        try:
            async with asyncio.timeout(self._timeout_s * 3):
                await self._deliver(message_of(mail, self._sender))
        except aiosmtplib.SMTPAuthenticationError as error:
            raise Transient("The mail server refused the user.", code="mail_login") from error
        except aiosmtplib.SMTPRecipientsRefused as error:
            codes = [one.code for one in error.recipients]
            raise _by_code(min(codes, default=451)) from error
        except (aiosmtplib.SMTPSenderRefused, aiosmtplib.SMTPDataError) as error:
            raise _by_code(error.code) from error
        # What a server answers before it was told of the mail says nothing of the mail: it is not given up.
        except (aiosmtplib.SMTPException, OSError, ssl.SSLError) as error:
            if _is_of_tls(error):
                raise Transient(
                    "TLS with the mail server failed: its certificate is not good, or it offers none.",
                    code="mail_tls",
                ) from error
            raise Transient("The mail server cannot be reached.", code="mail_server") from error

    async def _deliver(self, message: EmailMessage) -> None:
        server = self._server
        client = aiosmtplib.SMTP(
            hostname=server.host,
            port=server.port,
            username=server.user,
            password=server.password,
            timeout=self._timeout_s,
            use_tls=server.security == "tls",
            start_tls=server.security == "starttls",
            tls_context=None if server.security == "none" else self._trust,
        )
        async with client:
            await client.send_message(message)


class FileMailer:
    """Appends mail to a 0600 file instead of sending it: for development on one machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def send(self, mail: Mail) -> None:
        """Write one mail down, its text as it is: a link can be copied."""
        headers = message_of(mail, "millpond@localhost").items()
        shown = [f"{name}: {value}" for name, value in headers if name not in _OF_ENCODING]
        await asyncio.to_thread(self._append, "\n".join([*shown, "", mail.text]))

    def _append(self, text: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        with open(os.open(self._path, flags, 0o600), "a", encoding="utf-8") as file:
            file.write(f"{text}\n\n")


def message_of(mail: Mail, sender: str) -> EmailMessage:
    """Return the mail as a message of plain text that says it is automatic.

    Raises Permanent for one whose recipient or subject would not stand in its header as given: the standard
    library's parser decodes some texts there, and fails at others.
    """
    try:
        message = _message(mail, sender)
        names = [name for name, _ in message_from_bytes(message.as_bytes()).items()]
    except Exception as error:
        raise _unfit() from error
    if "=?" in mail.to or "=?" in mail.subject or names != list(message.keys()):
        raise _unfit()
    return message


def _message(mail: Mail, sender: str) -> EmailMessage:
    message = EmailMessage()
    message["From"] = sender
    message["To"] = mail.to
    message["Subject"] = mail.subject
    message["Date"] = formatdate()
    message["Auto-Submitted"] = "auto-generated"
    if mail.mail_id is not None:
        message["Message-ID"] = f"<{mail.mail_id}@{sender.rpartition('@')[2].strip('>')}>"
    message.set_content(mail.text)
    return message


def _unfit() -> Permanent:
    return Permanent("The mail's recipient or subject is no header.", code="mail_unfit")


def _is_of_tls(error: BaseException | None) -> bool:
    """Whether an error comes of a handshake, or of a server without STARTTLS."""
    while error is not None:
        if isinstance(error, ssl.SSLError) or "STARTTLS" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _by_code(code: int) -> Transient | Permanent:
    if code >= 500:
        return Permanent(f"The mail server refused the mail ({code}).", code="mail_refused")
    return Transient(f"The mail server asked to come back later ({code}).", code="mail_later")


def _malformed(why: str) -> InvalidInput:
    return InvalidInput(f"the mail server's address is wrong: {why}", param="MILLPOND_SMTP_URL")
