"""Calls about secrets: values go in, and never come out."""

from __future__ import annotations

from millpond.client.call import (
    UNSET,
    Call,
    Id,
    Unset,
    get,
    id_text,
    path_of,
    post,
    read_nothing,
    reader,
    set_of,
)
from millpond.client.models import Page
from millpond.client.models_secrets import Secret


def list_secrets(
    *,
    name: str | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[Secret]]:
    """Secrets without their values, newest first."""
    return get(
        path_of("secrets"),
        Page[Secret],
        name=name,
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def create_secret(name: str, value: str, *, description: str = "") -> Call[Secret]:
    """Store a secret under a new name."""
    body = {"name": name, "value": value, "description": description}
    return post(path_of("secrets"), Secret, body)


def get_secret(name: str) -> Call[Secret]:
    """Return one secret, without its value."""
    return get(path_of("secrets", name), Secret)


def put_secret(name: str, value: str, *, description: str | Unset = UNSET) -> Call[Secret]:
    """Store a secret, or replace its value."""
    body = {"value": value, **set_of({"description": description})}
    return Call(method="PUT", path=path_of("secrets", name), read=reader(Secret), body=body)


def delete_secret(name: str) -> Call[None]:
    """Remove a secret with its value."""
    return Call(method="DELETE", path=path_of("secrets", name), read=read_nothing)
