"""Calls about outside issuers of tokens, and whom they vouch for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from millpond.client.call import (
    UNSET,
    Call,
    Id,
    Unset,
    get,
    given,
    id_text,
    path_of,
    post,
    read_nothing,
    reader,
    set_of,
)
from millpond.client.models import Page
from millpond.client.models_issuers import Issuer, IssuerTest, OutsideIdentity


class RuleWish(TypedDict):
    """Values of a claim that give a role."""

    claim: str
    values: Sequence[str]
    role: str


def list_issuers(
    *,
    url: str | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[Issuer]]:
    """Issuers whose tokens the organization accepts, newest first."""
    return get(
        path_of("issuers"),
        Page[Issuer],
        url=url,
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def create_issuer(
    name: str,
    url: str,
    audiences: Sequence[str],
    rules: Sequence[RuleWish],
    *,
    algorithms: Sequence[str] | None = None,
    org_claim: str | None = None,
    org_values: Sequence[str] | None = None,
    trust_days: int | None = None,
) -> Call[Issuer]:
    """Accept an issuer's tokens: `rules` say which values of which claim give which role."""
    body: dict[str, Any] = {
        "name": name,
        "url": url,
        "audiences": list(audiences),
        "rules": list(rules),
        **given(
            {
                "algorithms": None if algorithms is None else list(algorithms),
                "org_claim": org_claim,
                "org_values": None if org_values is None else list(org_values),
                "trust_days": trust_days,
            }
        ),
    }
    return post(path_of("issuers"), Issuer, body)


def get_issuer(issuer_id: Id) -> Call[Issuer]:
    """Return one issuer."""
    return get(path_of("issuers", issuer_id), Issuer)


def change_issuer(
    issuer_id: Id,
    *,
    name: str | Unset = UNSET,
    audiences: Sequence[str] | Unset = UNSET,
    rules: Sequence[RuleWish] | Unset = UNSET,
    algorithms: Sequence[str] | Unset = UNSET,
    org_claim: str | Unset | None = UNSET,
    org_values: Sequence[str] | Unset = UNSET,
    trust_days: int | Unset = UNSET,
    is_disabled: bool | Unset = UNSET,
) -> Call[Issuer]:
    """Change what an issuer's tokens may, disable or enable it."""
    body = set_of(
        {
            "name": name,
            "audiences": audiences,
            "rules": rules,
            "algorithms": algorithms,
            "org_claim": org_claim,
            "org_values": org_values,
            "trust_days": trust_days,
            "is_disabled": is_disabled,
        }
    )
    path = path_of("issuers", issuer_id)
    return Call(method="PATCH", path=path, read=reader(Issuer), body=body)


def remove_issuer(issuer_id: Id) -> Call[None]:
    """Accept an issuer's tokens no more."""
    return Call(method="DELETE", path=path_of("issuers", issuer_id), read=read_nothing)


def test_issuer(issuer_id: Id) -> Call[IssuerTest]:
    """Ask an issuer for its keys now, and tell what came of it."""
    return post(path_of("issuers", issuer_id, "test"), IssuerTest)


def list_outside_identities(
    *,
    issuer: str | None = None,
    limit: int | None = None,
    after: Id | None = None,
    before: Id | None = None,
) -> Call[Page[OutsideIdentity]]:
    """Whom issuers vouched for, newest first; `issuer` is an address."""
    return get(
        path_of("outside-identities"),
        Page[OutsideIdentity],
        issuer=issuer,
        limit=limit,
        after=id_text(after),
        before=id_text(before),
    )


def get_outside_identity(identity_id: Id) -> Call[OutsideIdentity]:
    """Return one outside identity."""
    return get(path_of("outside-identities", identity_id), OutsideIdentity)


def change_outside_identity(identity_id: Id, is_disabled: bool) -> Call[OutsideIdentity]:
    """Disable or enable an outside identity."""
    path, body = path_of("outside-identities", identity_id), {"is_disabled": is_disabled}
    return Call(method="PATCH", path=path, read=reader(OutsideIdentity), body=body)
