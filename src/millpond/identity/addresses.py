"""Email addresses: one spelling for each, in ASCII, without anything that could end a header; pure.

Called by every room that takes an address from outside. Invariant: what passes here is how `account` stores it.
"""

from __future__ import annotations

import re

from millpond.errors import InvalidInput

MAX_CHARS = 254
_FORM = re.compile(
    r"[!-?A-~]{1,64}@[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*"
)
_QUOTING = frozenset('",:;<>()[]\\')


def parse_address(text: str, *, param: str = "email") -> str:
    """Return an address in lower case; raises InvalidInput for what cannot be one."""
    address = text.strip().lower()
    is_odd = (
        _QUOTING & set(address) or "=?" in address
    )  # what mail programs decode is not as it looks
    if len(address) > MAX_CHARS or not _FORM.fullmatch(address) or is_odd:
        raise InvalidInput("This is not an email address.", code="email_malformed", param=param)
    return address
