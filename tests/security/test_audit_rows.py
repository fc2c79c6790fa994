"""Every route that changes something tells the audit log, or is on a written list of those told otherwise.

The OpenAPI document is walked, so that a new route fails here first; then each is asked, and its rows are looked for.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from tests.security.conftest import World
from tests.security.test_matrix import DOCUMENT, asked, needed
from tests.security.things import FACTORIES, Bench

DOCS = Path(__file__).parents[2] / "docs" / "audit.md"
SOURCE = Path(__file__).parents[2] / "src" / "millpond"
# The actions that a route may write; asked of what the matrix makes, it writes the first.
TOLD: dict[str, tuple[str, ...]] = {
    "POST /v1/api-keys": ("api_key.created",),
    "DELETE /v1/api-keys/{key_id}": ("api_key.revoked",),
    "POST /v1/auth/invitations/accept": ("invitation.accepted",),
    "POST /v1/auth/operator": ("operator.created",),
    "POST /v1/auth/password-reset/confirm": ("password.reset",),
    "POST /v1/auth/refresh": ("refresh.reused",),
    "POST /v1/auth/register/confirm": ("account.created",),
    "POST /v1/auth/sign-in": ("session.started",),
    "POST /v1/auth/sign-out": ("session.revoked",),
    "POST /v1/me/password": ("password.changed",),
    "DELETE /v1/me/sessions/{session_id}": ("session.revoked",),
    "PUT /v1/limits": ("limit.set",),
    "DELETE /v1/limits": ("limit.removed",),
    "PUT /v1/platform/limits": ("limit.set",),
    "DELETE /v1/platform/limits": ("limit.removed",),
    "DELETE /v1/limits/brakes": ("brake.released",),
    "DELETE /v1/platform/limits/brakes": ("brake.released",),
    "POST /v1/flows/{name}/pause": ("flow.paused",),
    "POST /v1/flows/{name}/resume": ("flow.resumed",),
    "POST /v1/grants": ("grant.created",),
    "DELETE /v1/grants/{grant_id}": ("grant.ended",),
    "POST /v1/input-requests/{request_id}/resolve": ("input.resolved",),
    "POST /v1/invitations": ("invitation.created",),
    "DELETE /v1/invitations/{invitation_id}": ("invitation.revoked",),
    "POST /v1/invitations/{invitation_id}/resend": ("invitation.resent",),
    "POST /v1/issuers": ("issuer.created",),
    "PATCH /v1/issuers/{issuer_id}": ("issuer.changed",),
    "DELETE /v1/issuers/{issuer_id}": ("issuer.removed",),
    "PATCH /v1/outside-identities/{identity_id}": ("identity.disabled", "identity.enabled"),
    "POST /v1/knowledge-bases/{name}/documents": ("document.added",),
    "DELETE /v1/members/{user_id}": ("member.removed", "member.left"),
    "PATCH /v1/members/{user_id}": ("member.role_changed",),
    "PATCH /v1/org": ("org.changed",),
    "POST /v1/org/pause": ("org.paused",),
    "POST /v1/org/resume": ("org.resumed",),
    "PUT /v1/platform/plans/{name}": ("plan.created", "plan.changed"),
    "DELETE /v1/platform/plans/{name}": ("plan.deleted",),
    "PUT /v1/platform/orgs/{org_id}/plan": ("org.plan_changed",),
    "PUT /v1/platform/prices/{model}": ("price.changed",),
    "DELETE /v1/platform/prices/{model}": ("price.deleted",),
    "POST /v1/platform/operators": ("operator.added",),
    "DELETE /v1/platform/operators/{user_id}": ("operator.removed",),
    "POST /v1/platform/orgs": ("org.created",),
    "PATCH /v1/platform/orgs/{org_id}": ("org.renamed", "org.suspended", "org.unsuspended"),
    "POST /v1/queues/{name}/pause": ("queue.paused",),
    "POST /v1/queues/{name}/resume": ("queue.resumed",),
    "PUT /v1/roles/{name}": ("role.created", "role.changed"),
    "DELETE /v1/roles/{name}": ("role.deleted",),
    "POST /v1/runs/bulk": ("runs.cancelled", "runs.rerun"),
    "POST /v1/runs/{run_id}/cancel": ("run.cancelled",),
    "POST /v1/runs/{run_id}/release": ("run.released",),
    "POST /v1/runs/{run_id}/rerun": ("rerun.accepted",),
    "POST /v1/runs/{run_id}/resume": ("run.resumed",),
    "POST /v1/schedules": ("schedule.created",),
    "PATCH /v1/schedules/{schedule_id}": ("schedule.changed",),
    "DELETE /v1/schedules/{schedule_id}": ("schedule.deleted",),
    "POST /v1/schedules/{schedule_id}/pause": ("schedule.paused",),
    "POST /v1/schedules/{schedule_id}/resume": ("schedule.resumed",),
    "POST /v1/secrets": ("secret.created",),
    "PUT /v1/secrets/{name}": ("secret.changed",),
    "DELETE /v1/secrets/{name}": ("secret.removed",),
    "POST /v1/service-principals": ("service.created",),
    "PATCH /v1/service-principals/{service_id}": ("service.changed",),
    "POST /v1/triggers": ("trigger.created",),
    "PATCH /v1/triggers/{trigger_id}": ("trigger.changed",),
    "DELETE /v1/triggers/{trigger_id}": ("trigger.deleted",),
    "POST /v1/triggers/{trigger_id}/pause": ("trigger.paused",),
    "POST /v1/triggers/{trigger_id}/resume": ("trigger.resumed",),
}
# Written by commands on the machine and by workers, not by a route.
# `identity.…`: by the first token of somebody, or one that says something else, whatever route it is sent to.
BY_OTHERS = {
    "identity.linked",
    "identity.mapped",
    "operator.link_made",
    "operator.reset_link_made",
    "run.refused",
    "seal_key.emptied",
    "seal_key.rotated",
    "signing_key.rotated",
}
TOLD_OTHERWISE = {
    "POST /v1/runs": "its run row has who started it",
    "POST /v1/runs/batch": "their run rows have who started them",
    "POST /v1/schedules/{schedule_id}/run_now": "its run row has who started it",
    "POST /v1/runs/{run_id}/signals": "the run's event has who sent it",
    "POST /v1/events": "the received event has who sent it",
    "POST /v1/events/batch": "the received events have who sent them",
    "POST /v1/knowledge-bases/{name}/search": "it reads",
    "POST /v1/issuers/{issuer_id}/test": "it reads",
    "PATCH /v1/me": "a name that people give themselves decides nothing",
    "POST /v1/auth/password-reset": "nothing has changed until the link is used",
    "POST /v1/auth/register": "nothing has changed until the link is used",
}
# What is done to a run, or by one, names it.
OF_RUNS = ("run.", "runs.", "rerun.", "input.", "document.")
ROUTES = [
    f"{method.upper()} {path}"
    for path, operations in DOCUMENT["paths"].items()
    for method in operations
    if method != "get"
]
ASKED = [route for route in TOLD if tuple(route.split(" ", 1)) in FACTORIES]
QUIET = [route for route in TOLD_OTHERWISE if tuple(route.split(" ", 1)) in FACTORIES]


@pytest.fixture
async def bench(world: World) -> AsyncIterator[Bench]:
    """An owner of the org that things are made in."""
    async with AsyncExitStack() as closing:
        yield Bench(world, await world.owner_of(world.org_id), closing)


def test_every_route_that_changes_something_is_told_of() -> None:
    unknown = sorted(set(ROUTES) - set(TOLD) - set(TOLD_OTHERWISE))
    assert not unknown, (
        f"{unknown} change something: write an audit row in the same transaction (`caller.tell(con, "
        "'noun.past_tense', 'kind:id')` or `audit.record`), name the action here in TOLD and in docs/audit.md; "
        "or say in TOLD_OTHERWISE what tells of it"
    )
    gone = sorted((set(TOLD) | set(TOLD_OTHERWISE)) - set(ROUTES))
    assert not gone, f"{gone} are no routes any more: take them out here and in docs/audit.md"
    assert not set(TOLD) & set(TOLD_OTHERWISE)


def test_every_action_is_documented_and_every_documented_action_is_written() -> None:
    text = DOCS.read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([a-z_]+\.[a-z_]+)`", text, re.MULTILINE))
    written = {action for actions in TOLD.values() for action in actions} | BY_OTHERS
    assert written - documented == set(), "docs/audit.md says nothing of these"
    assert documented - written == set(), "docs/audit.md tells of actions that nothing writes"


async def actions_of(world: World) -> dict[str, str]:
    rows = await world.owner.fetch(
        """select audit_id, action, subject, address, run_id from audit where org_id = $1
           union all select audit_id, action, subject, address, null from platform_audit""",
        world.org_id,
    )
    return {
        str(row["audit_id"]): f"{row['action']} by {row['subject']} from {row['address']}"
        + (" in a run" if row["run_id"] is not None else "")
        for row in rows
    }


async def done(bench: Bench, route: str) -> list[str]:
    """Ask a route of what the matrix makes for it; returns what the log has new, with who did it as `them`."""
    method, path = route.split(" ", 1)
    world = bench.world
    wish = await FACTORIES[method, path](bench)
    if route == "POST /v1/runs/bulk":
        wish.json["dry_run"] = False
    declared = needed(world.front, method, path)
    if declared.is_of_platform:
        person = await world.person(is_operator=True)
    elif declared.permission == "inputs:resolve":
        person = await world.member("support")
    else:
        person = await world.member({declared.permission, *wish.also})
    before = await actions_of(world)
    answer = await asked(await world.client(person), method, path, wish)
    assert 200 <= answer.status_code < 300, answer.text
    new = [told for key, told in (await actions_of(world)).items() if key not in before]
    return [told.replace(person.subject, "them") for told in new]


@pytest.mark.parametrize("route", ASKED)
async def test_a_route_writes_its_row_naming_who_did_it_from_where_and_in_which_run(
    bench: Bench, route: str
) -> None:
    action = TOLD[route][0]
    where = " in a run" if action.startswith(OF_RUNS) else ""
    assert f"{action} by them from 127.0.0.1{where}" in await done(bench, route)


@pytest.mark.parametrize("route", QUIET)
async def test_what_is_told_otherwise_writes_no_row(bench: Bench, route: str) -> None:
    assert await done(bench, route) == []
