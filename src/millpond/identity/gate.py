"""The gate: a bearer's text becomes a principal, by whichever kind of token it is.

Called by the API for every request and every look at an open stream. Invariant: a text is handed to one reader
alone, chosen by its form; what that refuses, no other is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from millpond.errors import Unauthenticated
from millpond.identity.lending import Lending
from millpond.identity.passport import Passport
from millpond.identity.seating import Seating
from millpond.identity.tokens import Keyring
from millpond.types import Principal


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """Where a bearer wants to go: the org of the header, or the platform itself."""

    org: str | None = None
    is_of_platform: bool = False


class Reader(Protocol):
    """Reads one kind of bearer's text, such as API keys or tokens of outside issuers."""

    def reads(self, text: str) -> bool:
        """Whether the text has this reader's form."""
        ...

    async def admit(self, text: str, wish: Wish) -> Principal:
        """Return the principal; raises Unauthenticated or Forbidden."""
        ...

    def expires_at(self, text: str) -> float | None:
        """Return when a text that was admitted ends by itself; None where the database knows that alone."""
        ...


class Gate:
    """Admits bearers; `readers` are asked before the installation's own tokens.

    `lending` admits operators into orgs whose owner let them in; `seating` finds seats that a token has no room for.
    """

    def __init__(
        self,
        keyring: Keyring,
        readers: Sequence[Reader] = (),
        lending: Lending | None = None,
        seating: Seating | None = None,
    ) -> None:
        self.keyring = keyring
        self._readers = list(readers)
        self._lending = lending
        self._seating = seating

    async def admit(self, text: str, wish: Wish) -> Principal:
        """Return who a bearer is where it wants to go; raises Unauthenticated, Forbidden, InvalidInput."""
        if (reader := self._reader_of(text)) is not None:
            return await reader.admit(text, wish)
        passport = await self.read(text)
        if wish.is_of_platform:
            return passport.on_platform()
        if self._seating is not None and passport.is_in_many and wish.org is not None:
            passport = await self._seating.seated(passport, wish.org)
        if self._lending is not None and passport.is_guest(wish.org):
            return await self._lending.admit(passport, wish.org or "")
        return passport.in_org(wish.org)

    def expires_at(self, text: str) -> float | None:
        """Return when a token that was admitted ends, in seconds since the epoch; None for what does not."""
        reader = self._reader_of(text)
        return self.keyring.expires_at(text) if reader is None else reader.expires_at(text)

    async def anybody(self, text: str, org: str | None) -> Principal:
        """Return who a bearer is, also one who is in no org: a person is not asked for one."""
        if (reader := self._reader_of(text)) is not None:
            return await reader.admit(text, Wish(org=org))
        passport = await self.read(text)
        return passport.in_org(org) if passport.fixed is not None else passport.on_platform()

    def _reader_of(self, text: str) -> Reader | None:
        """Return whose form a text has; None for tokens of ours, the known ones of which are not looked into."""
        if self.keyring.knows(text):
            return None
        return next((one for one in self._readers if one.reads(text)), None)

    async def read(self, token: str) -> Passport:
        """Read a token of ours; keys are read again once a minute, and for one signed with an unknown one."""
        keyring = self.keyring
        await keyring.freshen()
        try:
            return keyring.read(token)
        except Unauthenticated as error:
            if error.code != "token_unknown_key":
                raise
        await keyring.refresh()
        return keyring.read(token)
