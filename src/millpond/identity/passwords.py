"""Passwords: argon2id in a few threads, and the rules for new ones.

Called by `sign_in`, `accounts` and `operators`. Invariant: checking takes one computation of the same size whether or
not there is an account, so that neither the answer nor its time tells.
"""

from __future__ import annotations

import asyncio
import secrets
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from millpond.errors import InvalidInput, Transient

MIN_CHARS = 12
MAX_CHARS = 1024
_THREADS = 2
# More than these wait for seconds: the rest is asked to come back.
_WAITING_MAX = 64
T = TypeVar("T")


class Passwords:
    """Hashes and checks passwords, each in `memory_kib` of memory, two at a time."""

    def __init__(self, *, memory_kib: int = 65_536, rounds: int = 3) -> None:
        self._hasher = PasswordHasher(time_cost=rounds, memory_cost=memory_kib, parallelism=1)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="argon2")
        self._waiting = 0
        # Nobody knows what this is the hash of.
        self._dummy = self._hasher.hash(secrets.token_hex(32))

    async def hash(self, password: str) -> str:
        """Return the hash to store, with its salt and parameters."""
        return await self._in_thread(lambda: self._hasher.hash(_prepared(password)))

    async def is_right(self, stored: str | None, password: str) -> bool:
        """Tell whether a password is the stored one; without one, take as long and say no."""
        known = stored if stored is not None else self._dummy
        is_same = await self._in_thread(lambda: self._verify(known, _prepared(password)))
        return is_same and stored is not None

    def is_outdated(self, stored: str) -> bool:
        """Whether a hash was made with other parameters than these."""
        return self._hasher.check_needs_rehash(stored)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _verify(self, stored: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored, password)
        except (VerificationError, InvalidHashError):
            return False

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._waiting >= _WAITING_MAX:
            raise Transient("Too many people sign in at once.", retry_after_s=2.0)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1


def check_password(password: str, email: str, *, param: str = "password") -> None:
    """Raise InvalidInput for a new password that breaks a rule: its length, or that it is the address."""
    if not MIN_CHARS <= len(_prepared(password)) <= MAX_CHARS:
        raise InvalidInput(
            f"A password has {MIN_CHARS} to {MAX_CHARS} characters.",
            code="password_length",
            param=param,
            advice="several words that only you would put together make a good one",
        )
    if password.strip().casefold() == email.casefold():
        raise InvalidInput(
            "The password is the email address.", code="password_is_address", param=param
        )


def _prepared(password: str) -> str:
    # One text has several spellings in Unicode; which one is typed depends on the keyboard (RFC 8265).
    return unicodedata.normalize("NFC", password)
