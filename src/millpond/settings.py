"""Settings: everything that an operator may set, read once from the environment by `cli`.

Invariant: nothing below `cli` reads the environment; rooms get the values they need passed in.
Each field is `MILLPOND_<NAME>` in upper case; durations are in seconds, sizes in bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


def default_data_dir() -> Path:
    """Return where the embedded database and keys live: the user's data directory.

    Root gets `/var/lib/millpond`: the server then runs as a system user of its own, which has to
    be able to reach it without opening anybody's home.
    """
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return Path("/var/lib/millpond")
    return Path(platformdirs.user_data_dir("millpond", appauthor=False))


class Settings(BaseSettings):
    """All settings with their defaults; see `docs/settings.md`."""

    model_config = SettingsConfigDict(env_prefix="MILLPOND_", extra="ignore", frozen=True)

    database_url: SecretStr | None = Field(
        None,
        description="Postgres address of the application role (millpond_app). Unset: embedded Postgres.",
    )
    engine_database_url: SecretStr | None = Field(
        None, description="Postgres address of the engine role (millpond_engine)."
    )
    owner_database_url: SecretStr | None = Field(
        None, description="Postgres address of the owner; used by `millpond migrate` only."
    )
    listen_database_url: SecretStr | None = Field(
        None,
        description="Direct address for LISTEN when the others go through a transaction pooler.",
    )
    data_dir: Path = Field(
        default_factory=default_data_dir,
        description="Folder of the embedded database, keys and logs.",
    )
    host: str = Field("127.0.0.1", description="Address that the API listens on.")
    port: int = Field(8080, description="Port that the API listens on; 0 takes a free one.", ge=0)
    flows: str = Field("", description="Modules that register flows, separated by commas.")
    queues: str = Field(
        "default:100,llm:20,sql:10,index:4,support:20",
        description="Queues that a worker serves, with their slots: `name:slots,…`.",
    )
    spill: str = Field(
        "",
        description="Which other queues the idle slots of a queue help, in order: `queue:helped+helped,…`. "
        "Unset: none.",
    )
    spill_keep: str = Field(
        "",
        description="Slots of a queue that stay free when it helps others: `queue:slots,…`.",
    )
    reserve: str = Field(
        "",
        description="The last free slots of a queue, so many, that only orgs take that are not above their share: "
        "`queue:slots,…`.",
    )
    interactive_lead_s: float = Field(
        30.0,
        description="How many worker-seconds interactive work of an org may go before its turn, times the org's "
        "weight; 0 lets it go as any other.",
        ge=0,
    )
    limits: str | None = Field(
        None,
        description="Limits of the platform, with `;` or new lines between: `KEY concurrency=N`, "
        "`KEY rate=N/SECONDS burst=N` or `KEY tokens=N/SECONDS`. Set by each API process as it starts; empty: "
        "there are none any more. Unset: nothing is changed.",
    )
    limits_file: Path | None = Field(
        None,
        description="File with limits of the platform, one on a line, beside those of `MILLPOND_LIMITS`.",
    )
    processes: int = Field(
        1, description="How many worker processes to run, each with all the slots.", ge=1, le=256
    )
    labels: str = Field(
        "",
        description="What a worker has that flows and steps may need: `name=value,…`, such as `gpu=true`.",
    )
    lease_s: float = Field(6.0, description="How long a silent worker keeps its leases.", gt=1)
    drain_s: float = Field(20.0, description="How long SIGTERM lets runs finish.", ge=0)
    retention_days: float = Field(
        30.0,
        description="How long finished runs are kept, with their steps, events, values and questions; "
        "0 keeps them.",
        ge=0,
        le=36_600,
    )
    idempotency_hours: float = Field(
        24.0, description="How long a repeat of a request is recognized by its key.", gt=0
    )
    inbound_event_days: float = Field(
        30.0, description="How long received events are kept, and repeats recognized.", gt=0
    )
    secret_key: SecretStr | None = Field(
        None,
        description="Base64 of 32 bytes that seal stored secrets. Unset: a 0600 file in `data_dir`.",
    )
    old_secret_keys: SecretStr | None = Field(
        None,
        description="Older keys, with commas between: they open what they sealed until it is sealed anew by "
        "`millpond secrets rotate-key`.",
    )
    audit_heads_dir: Path | None = Field(
        None,
        description="Folder where the heads of audit logs are published; best on another machine's disk. "
        "Unset: `audit-heads` in `data_dir`.",
    )
    token_issuer: str = Field("millpond", description="`iss` of the tokens made here.")
    token_audience: str = Field("millpond", description="`aud` that tokens must name.")
    egress_allow: str = Field(
        "",
        description="Where requests to addresses that organizations name may go beside the public internet, separated "
        "by commas: `host-or-network:port`, `*` for any port, `http://` before it where HTTP may be plain.",
    )
    trusted_proxies: str = Field(
        "",
        description="Addresses or networks of proxies before the API, separated by commas: only from these is "
        "`X-Forwarded-For` believed.",
    )
    registration: Literal["closed", "invited", "open"] = Field(
        "invited",
        description="Who may make an account: nobody by themselves (`closed`), who was invited, or anybody (`open`).",
    )
    access_token_s: float = Field(
        900.0, description="How long an access token of somebody signed in lasts.", ge=30, le=86_400
    )
    session_idle_days: float = Field(
        14.0, description="How long a session lives without being renewed.", gt=0, le=3650
    )
    session_days: float = Field(
        90.0, description="How long a session lives at most.", gt=0, le=3650
    )
    public_url: str = Field(
        "",
        description="Address under which people reach this installation; mailed links begin with it. Unset: that of "
        "the API.",
    )
    smtp_url: SecretStr | None = Field(
        None,
        description="Mail server: `smtp://user:password@host:port` (STARTTLS), `smtps://…` (TLS), or on this machine "
        "`smtp+plain://…`.",
    )
    mail_from: str = Field("", description="Address that mail is from; needed with a mail server.")
    mail_file: Path | None = Field(
        None,
        description="File (0600) that mail is written to instead of being sent; only behind a loopback address. "
        "`millpond up` with its own database sets it.",
    )
    llm: str = Field(
        "",
        description="Model for text as `provider:name` (openai, anthropic, google, ollama, local).",
    )
    llm_base_url: str = Field("", description="Base URL of an OpenAI-compatible provider.")
    llm_api_key: SecretStr | None = Field(None, description="Key of the model provider.")
    embedder: str = Field(
        "local", description="Embedding model: `local` (bundled ONNX) or `provider:name`."
    )
    embedder_base_url: str = Field("", description="Base URL of the embedder's provider.")
    embedder_api_key: SecretStr | None = Field(
        None,
        description="Key of the embedder's provider. Unset: the text model's, if it is the same one.",
    )
    log_level: str = Field("info", description="debug, info, warning or error.")
