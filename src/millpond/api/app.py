"""The app: routes, errors and the OpenAPI document put together.

Called by `cli`, which hands in what the routes work with. Invariant: nothing here reads settings or
the environment, and no route exists without a declared permission or a place on the public list.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from millpond.api import problems
from millpond.api.batches import Batches
from millpond.api.catalog import Catalog
from millpond.api.models import CancelRun, Problem, ResolveRequest, SearchQuestion, StartRun
from millpond.api.models_calendar import (
    ChangeSchedule,
    ChangeTrigger,
    CreateSchedule,
    CreateTrigger,
    SendEvent,
    SendEvents,
)
from millpond.api.models_control import PauseQueue, PauseWork, ResumeQueue, StartBatch
from millpond.api.models_issuers import ChangeIdentity, ChangeIssuer, CreateIssuer
from millpond.api.models_limits import PutLimit
from millpond.api.models_orgs import (
    AcceptInvitation,
    ChangeMember,
    ChangeOrg,
    ChangeServicePrincipal,
    CreateApiKey,
    CreateGrant,
    CreateInvitation,
    CreateServicePrincipal,
    PutRole,
)
from millpond.api.models_people import (
    ChangeMe,
    ChangePassword,
    ClaimOperator,
    ConfirmRegistration,
    ConfirmReset,
    Refresh,
    Register,
    RequestReset,
    SignIn,
)
from millpond.api.models_plans import PutPlan, SetOrgPlan, SetPrice
from millpond.api.models_platform import AddOperator, ChangePlatformOrg, CreateOrg
from millpond.api.models_reruns import BulkAction, ReleaseRun, RerunRun
from millpond.api.models_secrets import CreateSecret, PutSecret
from millpond.api.models_signals import SendSignal
from millpond.api.ports import Ports
from millpond.api.rates import Rates
from millpond.api.readiness import Readiness, SchemaCheck
from millpond.api.routes import (
    api_keys,
    audit,
    blocked,
    brakes,
    bulk,
    flows,
    grants,
    health,
    inbound_events,
    inputs,
    invitations,
    issuers,
    keys,
    knowledge_bases,
    limits,
    me,
    members,
    organization,
    pauses,
    plans,
    platform,
    queues,
    reruns,
    roles,
    run_batches,
    run_events,
    runs,
    saturation,
    schedules,
    secrets,
    service_principals,
    sign_in,
    signals,
    triggers,
    usage,
    why,
    workers,
)
from millpond.db.pool import Database
from millpond.engine.events import Feed
from millpond.engine.hints import Hints
from millpond.engine.quota_plans import Plans
from millpond.engine.reserving import Reserver
from millpond.identity.audit_check import Auditor
from millpond.identity.gate import Gate
from millpond.identity.invitations import Mail
from millpond.identity.outside_reader import OutsideReader
from millpond.identity.people import People
from millpond.knowledge.store import KnowledgeStore

_DESCRIPTION = """\
Accepts AI work and shows what becomes of it. Whatever is accepted is stored before the answer (202),
is worked on by workers, and is followed by its events.

Errors are RFC 9457 problem documents. Lists are newest first and paged by `after` and `before`.
A POST that starts a run takes an `Idempotency-Key`.
"""
_REFERRED = (
    StartRun,
    StartBatch,
    CancelRun,
    SendSignal,
    RerunRun,
    ReleaseRun,
    BulkAction,
    ResolveRequest,
    SearchQuestion,
    CreateSchedule,
    ChangeSchedule,
    CreateTrigger,
    ChangeTrigger,
    SendEvent,
    SendEvents,
    PauseWork,
    PauseQueue,
    ResumeQueue,
    SignIn,
    Refresh,
    Register,
    ConfirmRegistration,
    RequestReset,
    ConfirmReset,
    ClaimOperator,
    ChangeMe,
    ChangePassword,
    ChangeOrg,
    ChangeMember,
    PutRole,
    CreateInvitation,
    AcceptInvitation,
    CreateServicePrincipal,
    ChangeServicePrincipal,
    CreateApiKey,
    CreateGrant,
    CreateIssuer,
    ChangeIssuer,
    ChangeIdentity,
    CreateSecret,
    PutSecret,
    CreateOrg,
    ChangePlatformOrg,
    AddOperator,
    PutPlan,
    SetOrgPlan,
    SetPrice,
    PutLimit,
    Problem,
)
_ROOMS = (
    runs,
    run_batches,
    run_events,
    why,
    signals,
    blocked,
    reruns,
    bulk,
    schedules,
    triggers,
    inbound_events,
    inputs,
    flows,
    queues,
    pauses,
    workers,
    limits,
    saturation,
    brakes,
    organization,
    members,
    invitations,
    roles,
    service_principals,
    api_keys,
    issuers,
    secrets,
    grants,
    platform,
    plans,
    usage,
    audit,
    keys,
    sign_in,
    me,
    health,
)


class Api(FastAPI):
    """FastAPI whose OpenAPI document also has the models that routes refer to by name."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document, made once."""
        if self.openapi_schema is None:
            document = get_openapi(
                title=self.title,
                version=self.version,
                description=self.description,
                routes=self.routes,
            )
            _, referred = models_json_schema(
                [(model, "validation") for model in _REFERRED],
                ref_template="#/components/schemas/{model}",
            )
            document["components"]["schemas"].update(referred["$defs"])
            self.openapi_schema = document
        return self.openapi_schema


def create_app(
    *,
    db: Database,
    gate: Gate,
    hints: Hints,
    feed: Feed,
    people: People,
    auditor: Auditor,
    outside: OutsideReader,
    check_schema: SchemaCheck | None = None,
    knowledge: KnowledgeStore | None = None,
    mail: Mail | None = None,
    reserver: Reserver | None = None,
) -> FastAPI:
    """Return the API over these connections, which the caller keeps and closes.

    `check_schema` raises when database and code differ; `/readyz` asks it. Without a `knowledge`
    store there are no knowledge routes, without `mail` nobody can be invited.
    """
    app = Api(
        title="Millpond",
        version=version("millpond"),
        description=_DESCRIPTION,
        docs_url=None,  # its pages load code from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},
    )
    held = reserver or Reserver(db, Plans())
    app.state.ports = Ports(
        db=db,
        gate=gate,
        hints=hints,
        feed=feed,
        catalog=Catalog(db),
        batches=Batches(db, held),
        readiness=Readiness(db, check_schema),
        people=people,
        auditor=auditor,
        outside=outside,
        reserver=held,
        rates=Rates(db),
        knowledge=knowledge,
        mail=mail,
    )
    problems.install(app)
    for room in _ROOMS:
        app.include_router(room.router)
    if knowledge is not None:
        app.include_router(knowledge_bases.router)
    return app
