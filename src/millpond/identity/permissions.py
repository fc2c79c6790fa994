"""Permissions and the built-in roles that are sets of them; pure.

Called by whoever signs or reads rights. Invariants: a permission is `noun:verb` and stands in the table
below, whose sentence the documentation shows; what a role may is decided here or by a custom role, never in
a token; the platform's permissions are in no role of an org.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from millpond.errors import InvalidInput

PERMISSIONS: Mapping[str, str] = {
    "runs:start": "Start runs of flows that callers may start.",
    "runs:read": "See runs with their steps, events, inputs and outputs.",
    "runs:cancel": "Cancel runs.",
    "runs:signal": "Send signals to runs.",
    "runs:operate": "Rerun, release and act on many runs at once.",
    "inputs:read": "See questions to humans.",
    "inputs:resolve": "Answer questions to humans.",
    "flows:read": "See which flows can be run.",
    "flows:operate": "Pause and resume flows.",
    "queues:read": "See queues and pauses.",
    "queues:operate": "Pause and resume queues of the organization.",
    "limits:read": "See limits on keys.",
    "limits:write": "Set limits on keys of the organization's own work.",
    "workers:read": "See the live workers.",
    "knowledge:read": "Search and read knowledge bases.",
    "knowledge:write": "Change knowledge bases and their documents.",
    "schedules:read": "See schedules.",
    "schedules:write": "Change schedules.",
    "triggers:read": "See triggers.",
    "triggers:write": "Change triggers.",
    "events:read": "See received events.",
    "events:send": "Send events that may start runs.",
    "org:read": "See the organization, its plan and its policy.",
    "org:write": "Change the organization and its policy.",
    "org:operate": "Pause and resume all work of the organization.",
    "members:read": "See members and invitations.",
    "members:write": "Invite, change and remove members.",
    "roles:read": "See roles with their permissions.",
    "roles:write": "Change custom roles.",
    "services:read": "See service principals.",
    "services:write": "Change service principals.",
    "keys:read": "See API keys (never their secrets).",
    "keys:write": "Make and revoke API keys.",
    "secrets:read": "See which secrets exist (never their values).",
    "secrets:write": "Store, replace and remove secrets.",
    "issuers:read": "See outside issuers of tokens.",
    "issuers:write": "Change outside issuers of tokens.",
    "usage:read": "See usage and quotas.",
    "audit:read": "Read, verify and export the audit log.",
    "grants:read": "See which operators were let in.",
    "grants:write": "Let an operator of the platform in, and end that.",
    "metrics:read": "Read the metrics of the installation.",
    "platform:read": "See organizations, plans and operators of the platform.",
    "platform:write": "Change organizations, plans and operators of the platform.",
    "platform:operate": "Pause and resume queues for every organization.",
}
PLATFORM = frozenset(one for one in PERMISSIONS if one.startswith("platform:")) | {"metrics:read"}
_OF_ORGS = frozenset(PERMISSIONS) - PLATFORM
_PRIVATE = {
    "audit:read",
    "keys:read",
    "secrets:read",
    "issuers:read",
    "grants:read",
    "services:read",
}
_VIEWER = frozenset(one for one in _OF_ORGS if one.endswith(":read")) - _PRIVATE
_SUPPORT = _VIEWER | {"runs:start", "runs:cancel", "runs:signal", "inputs:resolve"}
_ANALYST = _VIEWER | {"runs:start", "runs:cancel"}
_BUILDER = _VIEWER | {
    "runs:start",
    "runs:cancel",
    "runs:signal",
    "runs:operate",
    "flows:operate",
    "queues:operate",
    "limits:write",
    "knowledge:write",
    "schedules:write",
    "triggers:write",
    "events:send",
    "services:read",
    "secrets:read",
    "secrets:write",
}

OWNER = "owner"
# From the most to the least powerful.
ROLES: Mapping[str, frozenset[str]] = {
    OWNER: _OF_ORGS,
    "admin": _OF_ORGS - {"grants:write"},
    "builder": _BUILDER,
    "analyst": _ANALYST,
    "support": _SUPPORT,
    "viewer": _VIEWER,
}
# What an operator may in an org that let them in: to look, or to do what a builder does; never to open
# secrets, mint keys or approve.
LENT_READ = _VIEWER | {"audit:read"}
# What acts later by itself would outlast the grant.
_OUTLASTING = {"schedules:write", "triggers:write"}
LENT_WRITE = (_BUILDER | {"audit:read"}) - {
    "secrets:read",
    "secrets:write",
    "services:read",
    *_OUTLASTING,
}


def permissions_of(role: str, custom: Collection[str] | None = None) -> frozenset[str]:
    """Return what a role may; `custom` are the permissions of a role that is not built in.

    Words that are no permission of an org are left out, and so is a role that nobody knows.
    """
    if role in ROLES:
        return ROLES[role]
    return frozenset(custom or ()) & _OF_ORGS


def check_permissions(words: Collection[str], *, param: str) -> frozenset[str]:
    """Return the words as permissions of an org; raises InvalidInput naming one that is none."""
    for word in words:
        if word not in _OF_ORGS:
            raise InvalidInput(
                f"{word!r} is no permission that an organization can give",
                param=param,
                advice="`GET /v1/roles` lists them",
            )
    return frozenset(words)
