"""Settings as the command line sees them: environment first, options over it; what they mean.

Called by the commands that start or inspect something. Invariant: a wrong value is named by its
variable, and no secret is ever part of a message.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError

from millpond.cli.options import read_pairs
from millpond.cli.spills import SpillTexts, read_counts, read_spill, words
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
    return [*BUILT_IN_FLOWS, *words(settings.flows)]


def queue_slots(settings: Settings) -> dict[str, int]:
    """Read `name:slots,…`; raises InvalidInput for an entry that is not that."""
    slots = read_counts(settings.queues, param="MILLPOND_QUEUES")
    if not slots:
        raise InvalidInput("a worker serves at least one queue", param="MILLPOND_QUEUES")
    return slots


def spill_of(settings: Settings, slots: Mapping[str, int]) -> Spill:
    """Read whom idle slots help, and what is kept and reserved; raises InvalidInput for what cannot be."""
    names = ("MILLPOND_SPILL", "MILLPOND_SPILL_KEEP", "MILLPOND_RESERVE")
    texts = SpillTexts(
        spill=settings.spill, keep=settings.spill_keep, reserve=settings.reserve, names=names
    )
    return read_spill(texts, slots)


def worker_labels(settings: Settings) -> dict[str, str]:
    """Read `name=value,…`; raises InvalidInput for an entry that is not that."""
    return read_pairs(words(settings.labels), param="MILLPOND_LABELS")


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


def _needed(url: str | None, variable: str, role: str) -> str:
    if url is None:
        raise InvalidInput(
            f"{variable} is not set", advice=f"Set it to the Postgres address of {role}."
        )
    return url
