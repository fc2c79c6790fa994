"""The seal: AES-GCM around secrets at rest, under the installation's key.

Held by `ring`, which knows which key seals now. Invariant: what was
sealed opens only under the same key and with the same associated words, so that a sealed value
copied to another row or column does not open.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os

import orjson
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from millpond.errors import InvalidInput, Permanent

KEY_BYTES = 32
_NONCE_BYTES = 12
_FORMAT = b"\x01"


class Seal:
    """Seals and opens bytes under one key; `key_id` names the key without telling it."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise InvalidInput(
                f"the secret key has {len(key)} bytes; it needs {KEY_BYTES}",
                param="MILLPOND_SECRET_KEY",
            )
        self._key = key
        self._cipher = AESGCM(key)
        self.key_id = hashlib.sha256(b"millpond seal\x00" + key).hexdigest()[:16]

    def __repr__(self) -> str:
        """Return the key's id only."""
        return f"Seal(key_id={self.key_id!r})"

    @classmethod
    def from_text(cls, text: str) -> Seal:
        """Make a seal of a base64 key (standard or URL alphabet), as an operator sets it."""
        plain = text.strip().replace("-", "+").replace("_", "/")
        try:
            key = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidInput(
                "the secret key is not base64",
                param="MILLPOND_SECRET_KEY",
                advice="make one with: head -c 32 /dev/urandom | base64",
            ) from error
        return cls(key)

    def seal(self, plain: bytes, *associated: str) -> bytes:
        """Encrypt `plain`, bound to the words in `associated`."""
        nonce = os.urandom(_NONCE_BYTES)
        return _FORMAT + nonce + self._cipher.encrypt(nonce, plain, self._bound(associated))

    def open(self, sealed: bytes, *associated: str) -> bytes:
        """Decrypt what `seal` made; raises Permanent when key, words or bytes differ."""
        nonce, box = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            if sealed[:1] != _FORMAT or len(nonce) != _NONCE_BYTES:
                raise InvalidTag
            return self._cipher.decrypt(nonce, box, self._bound(associated))
        except InvalidTag as error:
            raise Permanent(
                "a sealed value does not open: it was changed, moved or sealed with another key",
                code="seal_broken",
                details={"seal_key_id": self.key_id},
            ) from error

    def derive(self, purpose: str, key_id: str) -> bytes:
        """Return the key for one purpose, such as chaining the audit log; raises Permanent for an unknown id.

        By HKDF (RFC 5869): it tells nothing of the installation's key, nor of other purposes' keys.
        """
        if key_id != self.key_id:
            raise Permanent(
                f"the key {key_id} is not known here",
                code="seal_key_unknown",
                details={"seal_key_id": key_id},
            )
        info = b"millpond\x00" + purpose.encode()
        return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(self._key)

    def _bound(self, associated: tuple[str, ...]) -> bytes:
        return orjson.dumps([self.key_id, *associated])
