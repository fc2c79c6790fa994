"""The client covers the API: every route has a call, and every call says all that its route takes.

The OpenAPI document is walked, so that a route, a parameter or a member that is new fails here first.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from typing import Any

import pytest
from tests.api.conftest import Front

from millpond.client import (
    Client,
    models,
    models_audit,
    models_calendar,
    models_control,
    models_issuers,
    models_knowledge,
    models_orgs,
    models_people,
    models_plans,
    models_secrets,
)
from millpond.client.call import Call
from millpond.client.calls.events import EventWish
from millpond.client.calls.runs import RunWish
from millpond.client.surface import Group, Made

# Not for users' code, or done by something else than a call.
WITHOUT_A_CALL = {
    "GET /healthz",
    "GET /readyz",
    "GET /.well-known/jwks.json",
}
ID = "018f0000-0000-7000-8000-000000000000"
SAME_TWICE = {
    "POST /v1/runs/{run_id}/cancel",
    "POST /v1/runs/bulk",  # the dry run; the other carries a key
    "POST /v1/events/batch",
    "POST /v1/auth/sign-out",
    "POST /v1/knowledge-bases/{name}/search",
}
# What the server answers, and what the client makes of it.
ANSWERS: dict[str, type[models.Answer]] = {
    "AcceptedRun": models.RunData,
    "AcceptedRerun": models.RunData,
    "Run": models.RunData,
    "RunDetail": models.RunData,
    "Step": models.Step,
    "InputRequest": models.InputRequest,
    "EventOut": models.Event,
    "RunEventOut": models.OrgEvent,
    "AcceptedBatch": models.RunBatch,
    "BulkPreview": models.BulkPreview,
    "SignalOut": models.Signal,
    "FlowOut": models_control.Flow,
    "QueueOut": models_control.Queue,
    "PauseOut": models_control.Pause,
    "ResumedOut": models_control.Resumed,
    "WorkerOut": models_control.Worker,
    "LimitOut": models_control.Limit,
    "BrakeOut": models_control.Brake,
    "RecordedRun": models_control.RecordedRun,
    "SaturationOut": models_control.Saturation,
    "PlatformSaturationOut": models_control.PlatformSaturation,
    "WhyOut": models_control.Why,
    "EstimateOut": models_control.WhyEstimate,
    "WhyReason": models_control.WhyReason,
    "ScheduleOut": models_calendar.Schedule,
    "ScheduleDetail": models_calendar.Schedule,
    "TriggerOut": models_calendar.Trigger,
    "TriggerDetail": models_calendar.Trigger,
    "WaitingOut": models_calendar.Waiting,
    "InboundEventOut": models_calendar.InboundEvent,
    "InboundEvents": models_calendar.InboundEvents,
    "StartedRun": models_calendar.StartedRun,
    "SignedInOut": models_people.SignedIn,
    "UserOut": models_people.User,
    "SeatOut": models_people.SeatInOrg,
    "CreatedUser": models_people.CreatedUser,
    "MailedOut": models_people.Mailed,
    "MeOut": models_people.Me,
    "SessionOut": models_people.MySession,
    "PlanOut": models_plans.Plan,
    "QuotaOut": models_plans.Quota,
    "QuotasOut": models_plans.Quotas,
    "PriceOut": models_plans.Price,
    "UsageSum": models_plans.UsageSum,
    "UsageOut": models_plans.UsageRow,
    "UsageListing": models_plans.Usage,
    "AuditEntry": models_audit.AuditEntry,
    "SealOut": models_audit.AuditSeal,
    "AuditHead": models_audit.AuditSeal,
    "AuditFault": models_audit.AuditFault,
    "AuditVerification": models_audit.AuditVerification,
    "PolicyOut": models_orgs.Policy,
    "OrgOut": models_orgs.Organization,
    "MemberOut": models_orgs.Member,
    "RoleListing": models_orgs.Roles,
    "RoleOut": models_orgs.Role,
    "InvitationOut": models_orgs.Invitation,
    "AcceptedInvitation": models_orgs.Joined,
    "ServicePrincipalOut": models_orgs.ServicePrincipal,
    "ApiKeyOut": models_orgs.ApiKey,
    "NewApiKey": models_orgs.NewApiKey,
    "GrantOut": models_orgs.Grant,
    "IssuerOut": models_issuers.Issuer,
    "IssuerTest": models_issuers.IssuerTest,
    "IssuerKey": models_issuers.IssuerKey,
    "RuleOut": models_issuers.IssuerRule,
    "OutsideIdentityOut": models_issuers.OutsideIdentity,
    "SecretOut": models_secrets.Secret,
    "PlatformOrgOut": models_orgs.PlatformOrganization,
    "CreatedOrg": models_orgs.CreatedOrganization,
    "OperatorOut": models_orgs.Operator,
    "KnowledgeBaseOut": models_knowledge.KnowledgeBase,
    "DocumentOut": models_knowledge.Document,
    "PassageOut": models_knowledge.Passage,
    "SearchOut": models_knowledge.SearchResult,
}


def builders() -> Iterator[Callable[..., Call[Any]]]:
    """Return the function behind every method of every group of a client."""
    with Client() as pond:
        groups = [one for one in vars(pond).values() if isinstance(one, Group)]
    for group in groups:
        for _, made in inspect.getmembers_static(type(group)):
            if isinstance(made, Made):
                yield made.build


def full(build: Callable[..., Call[Any]]) -> Call[Any]:
    """Make a call with everything given that it takes."""
    values = {
        name: _value(name, str(parameter.annotation))
        for name, parameter in inspect.signature(build).parameters.items()
    }
    return build(**values)


def _value(name: str, annotation: str) -> Any:
    if name in ("runs", "events"):
        return [{"flow": "f", "name": "n"}]
    if annotation.startswith("datetime"):
        return datetime(2026, 1, 1, tzinfo=UTC)
    if annotation.startswith("date "):
        return date(2026, 1, 1)
    if annotation.startswith("Mapping"):
        return {"name": "value"}
    return {"bytes": b"x"}.get(annotation, ID)


def calls() -> list[Call[Any]]:
    return [full(build) for build in builders()]


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def of_route(route: str, known: list[Call[Any]]) -> list[Call[Any]]:
    """Return the calls of a route; `/v1/runs/batch` is not one of `/v1/runs/{run_id}`."""
    method, _, path = route.partition(" ")
    pattern = re.sub(r"\{\w+\}", ID, path)
    return [call for call in known if (call.method, call.path) == (method, pattern)]


@pytest.fixture
def document(front: Front) -> dict[str, Any]:
    """The API's description of itself."""
    found: dict[str, Any] = front.app.openapi()
    return found


async def test_every_route_has_a_call_and_every_call_a_route(document: dict[str, Any]) -> None:
    known = calls()
    routes = {route for route, _ in operations(document)}
    assert {route for route in routes if not of_route(route, known)} == WITHOUT_A_CALL
    served = [call for route in routes for call in of_route(route, known)]
    assert [call.path for call in known if call not in served] == []


async def test_every_call_says_all_that_its_route_takes(document: dict[str, Any]) -> None:
    known, faults = calls(), []
    for route, operation in operations(document):
        wanted = _members(document, operation)
        if route == "POST /v1/runs/bulk":
            wanted.discard("body.dry_run")  # one method for each
        for call in of_route(route, known):
            said = {f"query.{name}" for name in call.params}
            said |= {f"body.{name}" for name in call.body or {}} - {"body.dry_run"}
            if call.is_same_twice and route == "POST /v1/runs/bulk":
                said |= {"body.reason", "body.skip_endings"}  # nothing is done
            if said != wanted:
                faults.append((route, sorted(said ^ wanted)))
    assert faults == []


def _members(document: dict[str, Any], operation: dict[str, Any]) -> set[str]:
    found = {
        f"query.{one['name']}" for one in operation.get("parameters", []) if one["in"] == "query"
    }
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        found |= {f"body.{one}" for one in document["components"]["schemas"][name]["properties"]}
    return found


async def test_members_of_lists_and_filters_are_those_of_the_api(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert set(typing.get_type_hints(RunWish)) == set(schemas["StartRun"]["properties"])
    assert set(typing.get_type_hints(EventWish)) == set(schemas["SendEvent"]["properties"])
    for call in of_route("POST /v1/runs/bulk", calls()):
        assert set(call.body["filter"]) == set(schemas["RunsFilter"]["properties"])


async def test_a_key_is_carried_wherever_one_is_taken_and_nothing_else_is_repeated(
    document: dict[str, Any],
) -> None:
    for route, operation in operations(document):
        takes_key = any(one["name"] == "Idempotency-Key" for one in operation.get("parameters", []))
        for build in builders():
            if full(build) in of_route(route, [full(build)]):
                call = build(**_needed(build))
                has_key = call.idempotency_key is not None
                assert has_key == (takes_key and not call.is_same_twice), route
                is_read = route.startswith("GET ")
                assert call.is_repeatable == (is_read or has_key or route in SAME_TWICE), route


def _needed(build: Callable[..., Call[Any]]) -> dict[str, Any]:
    return {
        name: _value(name, str(parameter.annotation))
        for name, parameter in inspect.signature(build).parameters.items()
        if parameter.default is inspect.Parameter.empty
    }


async def test_answers_have_every_member_that_the_api_names(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    missing = {
        f"{name}.{one}"
        for name, model in ANSWERS.items()
        for one in schemas[name]["properties"]
        if one not in model.model_fields and one != "object"
    }
    assert missing == set()
    answered = set()
    for _, operation in operations(document):
        for status, response in operation["responses"].items():
            if int(status) < 300:
                schema = response.get("content", {}).get("application/json", {}).get("schema", {})
                answered.add(schema.get("$ref", "").rpartition("/")[2])
    items = {re.sub(r"^Listing_(\w+)_$", r"\1", name) for name in answered}
    assert items - {"", "Status", "KeySet"} <= set(ANSWERS)
    assert "FlowOut" in items
