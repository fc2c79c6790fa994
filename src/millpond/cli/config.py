"""Settings as the command line sees them: environment first, options over it; what they mean.

Called by the commands that start or inspect something. Invariant: a wrong value is named by its
variable, and no secret is ever part of a message.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError

from millpond.cli.options import read_pairs
from millpond.engine.spilling import Spill
from millpond.errors import InvalidInput
from millpond.settings import Settings

BUILT_IN_FLOWS = ("millpond.knowledge.flows", "millpond.engine.bulk")
_ADDRESSES = frozenset(
    {
        "MILLPOND_DATABASE_URL",
        "MILLPOND_ENGINE_DATABASE_URL",
        "MILLPOND_OWNER_DATABASE_URL",
        "MILLPOND_LISTEN_DATABASE_URL",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Databases:
    """Addresses of one installation's database, by role; `owner` is for migrations only."""

    app: str
    engine: str | None
    owner: str | None
    listen: str | None

    @property
    def app_listen(self) -> str:
        """The address on which the API listens for hints."""
        return self.listen or self.app

    @property
    def engine_listen(self) -> str:
        """The address on which a worker listens for hints."""
        return self.listen or self.need_engine()

    def need_engine(self) -> str:
        """Return the engine's address, or raise InvalidInput naming the variable to set."""
        return _needed(self.engine, "MILLPOND_ENGINE_DATABASE_URL", "millpond_engine")

    def need_owner(self) -> str:
        """Return the owner's address, or raise InvalidInput naming the variable to set."""
        return _needed(self.owner, "MILLPOND_OWNER_DATABASE_URL", "the owner")


def read_settings(**given: object) -> Settings:
    """Read the settings; options that were given (are not None) win over the environment."""
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(**overrides)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        raise InvalidInput(
            f"a setting has a wrong value: {first['msg']}", param=f"MILLPOND_{name.upper()}"
        ) from error


def external_databases(settings: Settings) -> Databases | None:
    """Return the addresses of the operator's own Postgres, or None for the embedded one."""
    app = plain_text(settings.database_url)
    if app is None:
        return None
    return Databases(
        app=app,
        engine=plain_text(settings.engine_database_url),
        owner=plain_text(settings.owner_database_url),
        listen=plain_text(settings.listen_database_url),
    )


def plain_text(secret: SecretStr | None) -> str | None:
    """Return what a secret setting holds; None where it is unset or empty."""
    return secret.get_secret_value() if secret is not None and secret.get_secret_value() else None


def audit_heads_dir(settings: Settings) -> Path:
    """Return the folder in which the heads of audit logs are published."""
    return settings.audit_heads_dir or settings.data_dir / "audit-heads"


def flow_modules(settings: Settings) -> list[str]:
    """Return the modules that register flows: Millpond's own, then the operator's."""
    return [*BUILT_IN_FLOWS, *_words(settings.flows)]


def queue_slots(settings: Settings) -> dict[str, int]:
    """Read `name:slots,…`; raises InvalidInput for an entry that is not that."""
    slots = _counts(settings.queues, param="MILLPOND_QUEUES")
    if not slots:
        raise InvalidInput("a worker serves at least one queue", param="MILLPOND_QUEUES")
    return slots


def spill_of(settings: Settings, slots: Mapping[str, int]) -> Spill:
    """Read whom idle slots help, and what is kept and reserved; raises InvalidInput for what cannot be."""
    helps: dict[str, list[str]] = {}
    for word in _words(settings.spill):
        name, _, text = word.partition(":")
        helped = text.split("+")
        if not name or not all(helped) or name in helped or len(helped) > len(set(helped)):
            raise InvalidInput(
                f"{word!r} is not `queue:helped+helped` with each of them once",
                param="MILLPOND_SPILL",
            )
        if name in helps:
            raise InvalidInput(f"queue {name} is named twice", param="MILLPOND_SPILL")
        helps[name] = helped
    keep = _counts(settings.spill_keep, param="MILLPOND_SPILL_KEEP")
    reserve = _counts(settings.reserve, param="MILLPOND_RESERVE")
    _check_slots(helps, slots, param="MILLPOND_SPILL")
    _check_slots(keep, slots, param="MILLPOND_SPILL_KEEP", most=keep)
    _check_slots(reserve, slots, param="MILLPOND_RESERVE", most=reserve)
    return Spill(helps=helps, keep=keep, reserve=reserve)


def _counts(text: str, *, param: str) -> dict[str, int]:
    slots: dict[str, int] = {}
    for word in _words(text):
        name, _, count = word.partition(":")
        if not name or not count.isdecimal() or int(count) < 1:
            raise InvalidInput(f"{word!r} is not `queue:slots` with at least one slot", param=param)
        slots[name] = int(count)
    return slots


def _check_slots(
    named: Iterable[str],
    slots: Mapping[str, int],
    *,
    param: str,
    most: Mapping[str, int] | None = None,
) -> None:
    """Refuse queues without slots of their own, and more than all but one of the slots that a queue has."""
    for queue in named:
        if queue not in slots:
            raise InvalidInput(
                f"queue {queue} has no slots of its own (MILLPOND_QUEUES)", param=param
            )
        if most is not None and most[queue] >= slots[queue]:
            raise InvalidInput(
                f"queue {queue} has {slots[queue]} slots, and {most[queue]} of them leave none",
                param=param,
            )


def worker_labels(settings: Settings) -> dict[str, str]:
    """Read `name=value,…`; raises InvalidInput for an entry that is not that."""
    return read_pairs(_words(settings.labels), param="MILLPOND_LABELS")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def import_from_here() -> None:
    """Let `--flows` name modules below the working directory, as `python -m` does."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def child_environment(settings: Settings, databases: Databases) -> dict[str, str]:
    """Return the environment of a child process: this one's, with the addresses it needs.

    Addresses that are inherited do not count, and the owner's is left out: children migrate nothing.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _ADDRESSES}
    named = {
        "MILLPOND_DATABASE_URL": databases.app,
        "MILLPOND_ENGINE_DATABASE_URL": databases.engine,
        "MILLPOND_LISTEN_DATABASE_URL": databases.listen,
        "MILLPOND_DATA_DIR": str(settings.data_dir),
        "MILLPOND_FLOWS": settings.flows,
        "MILLPOND_QUEUES": settings.queues,
        "MILLPOND_SPILL": settings.spill,
        "MILLPOND_SPILL_KEEP": settings.spill_keep,
        "MILLPOND_RESERVE": settings.reserve,
        "MILLPOND_LABELS": settings.labels,
        "MILLPOND_LEASE_S": str(settings.lease_s),
        "MILLPOND_DRAIN_S": str(settings.drain_s),
        "MILLPOND_PROCESSES": "1",
        "MILLPOND_RETENTION_DAYS": str(settings.retention_days),
        "MILLPOND_IDEMPOTENCY_HOURS": str(settings.idempotency_hours),
        "MILLPOND_INBOUND_EVENT_DAYS": str(settings.inbound_event_days),
    }
    if settings.limits is not None:
        named["MILLPOND_LIMITS"] = settings.limits
    if settings.limits_file is not None:
        named["MILLPOND_LIMITS_FILE"] = str(settings.limits_file)
    if settings.audit_heads_dir is not None:
        named["MILLPOND_AUDIT_HEADS_DIR"] = str(settings.audit_heads_dir)
    environment.update({name: value for name, value in named.items() if value is not None})
    return environment


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _needed(url: str | None, variable: str, role: str) -> str:
    if url is None:
        raise InvalidInput(
            f"{variable} is not set", advice=f"Set it to the Postgres address of {role}."
        )
    return url
