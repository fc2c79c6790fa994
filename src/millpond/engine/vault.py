"""The vault: what the engine needs of whoever keeps secrets.

Implemented above the engine, passed in by `cli`. Invariant: a value shows in no representation.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Opened(NamedTuple):
    """A secret's value with its name and version."""

    name: str
    version: int
    value: str

    def __repr__(self) -> str:
        """Return nothing of the value."""
        return f"Opened(name={self.name!r}, version={self.version})"


class Vault(Protocol):
    """Opens secrets of an org."""

    async def open(self, org_id: int, name: str, *, is_use: bool = True) -> Opened:
        """Return a secret; raises NotFound, Permanent where it does not open.

        Raises Transient where it may open later or elsewhere, and as Unavailable while the database is away.
        """
        ...
