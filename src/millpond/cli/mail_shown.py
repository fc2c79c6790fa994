"""Links of mails on the terminal of `millpond up`, beside the file to which development writes mail.

Called by `serve` where `up` asks for it. Invariant: a link is printed to a terminal only, never to a log, a file or a
pipe.
"""

from __future__ import annotations

import re
import sys

from rich.text import Text

from millpond.cli.output import out, plain
from millpond.identity.mailing import Mail, Mailer

_LINK = re.compile(r"^https?://\S+$", re.MULTILINE)


class ShowingMailer:
    """Sends mail by another mailer, and prints the links that are in it."""

    def __init__(self, mailer: Mailer) -> None:
        self._mailer = mailer

    async def send(self, mail: Mail) -> None:
        """Send one mail, then show its links; raises what the other mailer raises."""
        await self._mailer.send(mail)
        if sys.stdout.isatty():
            _show(mail)


def _show(mail: Mail) -> None:
    for link in _LINK.findall(mail.text):
        words = plain(f"{link}  (to {mail.to}: {mail.subject})")
        out().print(Text.assemble((f"{'mail':<12}", "bold"), words), soft_wrap=True)
    sys.stdout.flush()
