"""The tokens of a client, and when they are renewed.

Used by both clients, which do the call. Invariant: a refresh token is sent once; whoever keeps tokens elsewhere hears
of the new ones before the next call is made.
"""

from __future__ import annotations

from collections.abc import Callable

from millpond.client.call import Call
from millpond.client.calls.people import refresh_session
from millpond.client.errors import ApiError, Unauthenticated
from millpond.client.models_people import SignedIn

OnRenewed = Callable[[SignedIn], None]
# What a new access token can help with; everything else is a wrong token.
_RENEWABLE = frozenset({"token_expired", "token_stale", "token_missing"})


class Tokens:
    """An access token, and what it is renewed with, if anything."""

    def __init__(
        self, access: str | None, refresh: str | None, on_renewed: OnRenewed | None
    ) -> None:
        self.access = access
        self._refresh = refresh
        self._on_renewed = on_renewed

    def is_too_old(self, error: ApiError) -> bool:
        """Whether an error says that the access token is too old."""
        return isinstance(error, Unauthenticated) and error.code in _RENEWABLE

    @property
    def can_renew(self) -> bool:
        """Whether there is something to renew it with."""
        return self._refresh is not None

    def call(self) -> Call[SignedIn]:
        """Return the call that renews; it is made once, whatever comes of it."""
        refresh, self._refresh = self._refresh, None
        assert refresh is not None
        return refresh_session(refresh)

    def take(self, signed_in: SignedIn) -> None:
        """Keep what came, and tell whoever asked to hear of it."""
        self.access, self._refresh = signed_in.access_token, signed_in.refresh_token
        if self._on_renewed is not None:
            self._on_renewed(signed_in)
