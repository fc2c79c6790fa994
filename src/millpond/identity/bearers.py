"""Secret texts that name their org: API keys and invitations. Pure but for the randomness.

Called by `api_keys` and `invitations`. Invariant: only a SHA-256 digest of the whole text is stored; 256 bits of
chance need no slow hash.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_FORM = re.compile(r"(mp[ki])_([0-9a-z]{1,13})_([0-9a-z]{10})_([0-9a-f]{64})")
KEY, INVITATION = "mpk", "mpi"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bearer:
    """A secret text taken apart; the text itself stays with its holder."""

    org_id: int
    prefix: str
    digest: bytes


def make(kind: str, org_id: int) -> tuple[str, Bearer]:
    """Make a text of a kind for an org, and what of it may be stored."""
    prefix = "".join(secrets.choice(_DIGITS) for _ in range(10))
    text = f"{kind}_{_base36(org_id)}_{prefix}_{secrets.token_hex(32)}"
    return text, Bearer(org_id=org_id, prefix=prefix, digest=digest_of(text))


def read(kind: str, text: str) -> Bearer | None:
    """Take a text of a kind apart; None for what has another form."""
    found = _FORM.fullmatch(text)
    if found is None or found[1] != kind:
        return None
    org_id = int(found[2], 36)
    if not 0 < org_id < 2**63:
        return None
    return Bearer(org_id=org_id, prefix=found[3], digest=digest_of(text))


def digest_of(text: str) -> bytes:
    """Return what is stored of a text."""
    return hashlib.sha256(text.encode()).digest()


def _base36(number: int) -> str:
    digits = ""
    while True:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
        if not number:
            return digits
