"""What signing in and mail need, from the settings.

Called by `serve` and `operator`. Invariant: mail is written to a file only where no other machine reaches the API.
"""

from __future__ import annotations

import structlog

from millpond.cli.config import is_loopback
from millpond.cli.mail_shown import ShowingMailer
from millpond.db.pool import Database
from millpond.errors import InvalidInput
from millpond.identity.invitations import Mail
from millpond.identity.mailing import Mailer, Outbox
from millpond.identity.passwords import Passwords
from millpond.identity.people import People
from millpond.identity.ring import KeyRing
from millpond.identity.sessions import Lifetimes
from millpond.identity.tokens import Keyring
from millpond.integrations.mail import FileMailer, SmtpMailer, SmtpServer
from millpond.settings import Settings

_DAY_S = 86_400.0
_log = structlog.get_logger("millpond.mail")


def open_people(settings: Settings, db: Database, keyring: Keyring, ring: KeyRing) -> People:
    """Return what the rooms of people work with."""
    return People(
        db=db,
        keyring=keyring,
        ring=ring,
        passwords=Passwords(),
        lifetimes=Lifetimes(
            access_s=settings.access_token_s,
            idle_s=settings.session_idle_days * _DAY_S,
            session_s=settings.session_days * _DAY_S,
        ),
        registration=settings.registration,
        public_url=public_url(settings),
    )


def open_invitations(settings: Settings, ring: KeyRing) -> Mail:
    """Return how invitations are mailed."""
    outbox = Outbox(ring, ttl_s=_DAY_S)
    return Mail(outbox=outbox, link=f"{public_url(settings)}/invitation#token=")


def public_url(settings: Settings) -> str:
    """Return what links begin with."""
    return settings.public_url or f"http://{settings.host}:{settings.port}"


def open_mailer(settings: Settings, *, show_links: bool = False) -> Mailer | None:
    """Return how mail goes out, or None, with a warning, when nothing is set.

    With `show_links`, links in mail that is written to a file are shown on the terminal too, where there is one.
    """
    url = settings.smtp_url.get_secret_value() if settings.smtp_url is not None else ""
    if url:
        if "@" not in settings.mail_from:
            raise InvalidInput("mail has to be from an address", param="MILLPOND_MAIL_FROM")
        return SmtpMailer(SmtpServer.of_url(url), settings.mail_from)
    if settings.mail_file is not None:
        if not is_loopback(settings.host):
            raise InvalidInput(
                "mail is written to a file only behind a loopback address",
                param="MILLPOND_MAIL_FILE",
            )
        mailer = FileMailer(settings.mail_file)
        return ShowingMailer(mailer) if show_links else mailer
    _log.warning("mail.not_set", advice="set MILLPOND_SMTP_URL, or nobody can reset a password")
    return None
