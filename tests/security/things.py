"""Factories: for every route, a request on a thing that exists, made by an owner of the org that it is of.

A route that has none here fails the matrix. `also` are permissions that the request needs beside the route's own,
`makes` texts that only the org of the thing may ever see. `is_for_all`: the thing is of no org, or the request
makes what it names; `is_own`: it is about the caller's own org, which shows nothing that was made.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from tests.api.conftest import Client, until
from tests.security.conftest import World

from millpond.identity.permissions import ROLES
from millpond.knowledge.flows import ingest
from millpond.knowledge.store import KnowledgeStore


@dataclass
class Wish:
    """One request: its path filled in, and what it carries."""

    path: dict[str, str] = field(default_factory=dict)
    json: Any = None
    content: bytes | None = None
    params: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    also: frozenset[str] = frozenset()
    is_for_all: bool = False
    is_own: bool = False
    makes: tuple[str, ...] = ()


@dataclass
class Bench:
    """What a factory works with: the world, an owner's client, and a place for what shall go on."""

    world: World
    client: Client
    closing: AsyncExitStack


Factory = Callable[[Bench], Awaitable[Wish]]
FACTORIES: dict[tuple[str, str], Factory] = {}
SOME_ID = "0199aaaa-0000-7000-8000-000000000000"


def thing(*routes: str) -> Callable[[Factory], Factory]:
    """Register a factory for routes such as `GET /v1/runs/{run_id}`."""

    def keep(factory: Factory) -> Factory:
        for route in routes:
            method, _, path = route.partition(" ")
            FACTORIES[method, path] = factory
        return factory

    return keep


async def sent(client: Client, path: str, **body: Any) -> dict[str, Any]:
    """Post JSON and return the answer, which has to be good."""
    response = await client.post(path, json=body)
    assert response.status_code < 300, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def queued(at: Bench) -> str:
    """Accept a run that nobody executes."""
    await at.world.front.publish("echo")
    run: str = (await sent(at.client, "/v1/runs", flow="echo"))["id"]
    return run


async def waiting(at: Bench, name: str, function: Any, event: str) -> str:
    """Let a worker take a run so far that it waits, and keep the worker going."""
    at.world.front.registry.flows.clear()
    at.world.front.flow(function, name=name)
    await at.closing.enter_async_context(at.world.front.worker())
    run: str = (await sent(at.client, "/v1/runs", flow=name))["id"]
    await until(at.client, run, event)
    return run


async def _ask(ctx: Any, _: Any) -> Any:
    return (await ctx.ask_human("approve", role="support", form=dict, title="Send it?")).answer


async def _listen(ctx: Any, _: Any) -> Any:
    return await ctx.wait_event("paid")


@thing("GET /v1/runs", "GET /v1/run-events")
async def a_list(at: Bench) -> Wish:
    return Wish(makes=(await queued(at),))


@thing("GET /v1/flows", "GET /v1/workers")
async def what_is_for_all(at: Bench) -> Wish:
    await queued(at)
    return Wish(is_for_all=True)


@thing("GET /v1/queues")
async def queues(at: Bench) -> Wish:
    await queued(at)
    return Wish(makes=('"queued":1',))


@thing("GET /v1/events")
async def received(at: Bench) -> Wish:
    await sent(at.client, "/v1/events", name="placed.of-one-org", data=1)
    return Wish(makes=("placed.of-one-org",))


@thing("GET /v1/input-requests")
async def questions(at: Bench) -> Wish:
    return Wish(makes=(await waiting(at, "ask", _ask, "run.awaiting_input"),))


@thing("POST /v1/runs")
async def a_start(at: Bench) -> Wish:
    await at.world.front.publish("echo")
    return Wish(json={"flow": "echo"}, also=frozenset({"runs:start"}))


@thing("POST /v1/runs/batch")
async def a_batch(at: Bench) -> Wish:
    await at.world.front.publish("echo")
    return Wish(json={"runs": [{"flow": "echo"}]}, also=frozenset({"runs:start"}))


@thing("POST /v1/runs/bulk")
async def a_bulk(at: Bench) -> Wish:
    run = await queued(at)
    body = {"action": "cancel", "filter": {"flow": "echo"}, "dry_run": True}
    return Wish(json=body, also=frozenset({"runs:cancel", "runs:operate"}), makes=(run,))


@thing("GET /v1/runs/{run_id}", "GET /v1/runs/{run_id}/events", "GET /v1/runs/{run_id}/why")
@thing("POST /v1/runs/{run_id}/cancel", "POST /v1/runs/{run_id}/rerun")
async def a_run(at: Bench) -> Wish:
    return Wish(path={"run_id": await queued(at)}, also=frozenset({"runs:start", "runs:read"}))


@thing("POST /v1/runs/{run_id}/signals")
async def a_listening_run(at: Bench) -> Wish:
    run = await waiting(at, "listen", _listen, "run.waiting")
    return Wish(path={"run_id": run}, json={"name": "paid", "data": 1})


@thing("POST /v1/runs/{run_id}/resume")
async def a_blocked_run(at: Bench) -> Wish:
    """A run whose history its flow no longer matches."""

    async def changing(ctx: Any, name: str) -> None:
        await ctx.step(name, _one)
        await ctx.sleep(1.1)

    async def first(ctx: Any, _: Any) -> None:
        await changing(ctx, "first")

    async def second(ctx: Any, _: Any) -> None:
        await changing(ctx, "second")

    front = at.world.front
    front.registry.flows.clear()
    front.flow(first, name="changing")
    async with front.worker():
        run = (await sent(at.client, "/v1/runs", flow="changing"))["id"]
        await until(at.client, run, "run.waiting")
    front.registry.flows.clear()
    front.flow(second, name="changing")
    async with front.worker():
        await until(at.client, run, "run.blocked")
    return Wish(path={"run_id": run})


async def _one() -> int:
    return 1


@thing("POST /v1/runs/{run_id}/release")
async def a_poisoned_run(at: Bench) -> Wish:
    """A run that was failed as poison: arranged, since it takes the deaths of three processes."""
    run = await waiting(at, "fail", _fail, "run.failed")
    await at.world.owner.execute(
        "update run set error = jsonb_set(error::jsonb, '{code}', '\"poison\"')::json "
        "where run_id = $1::text::uuid",
        run,
    )
    return Wish(path={"run_id": run})


async def _fail(ctx: Any, _: Any) -> None:
    from millpond.errors import Permanent

    raise Permanent("no", code="no")


@thing("GET /v1/input-requests/{request_id}", "POST /v1/input-requests/{request_id}/resolve")
async def a_question(at: Bench) -> Wish:
    run = await waiting(at, "ask", _ask, "run.awaiting_input")
    page = (await at.client.get("/v1/input-requests", params={"run_id": run})).json()
    return Wish(path={"request_id": page["data"][0]["id"]}, json={"answer": {}})


@thing("GET /v1/flows/{name}", "POST /v1/flows/{name}/pause")
async def a_flow(at: Bench) -> Wish:
    await at.world.front.publish("echo")
    return Wish(path={"name": "echo"}, is_for_all=True)


@thing("POST /v1/flows/{name}/resume")
async def a_paused_flow(at: Bench) -> Wish:
    await at.world.front.publish("echo")
    await sent(at.client, "/v1/flows/echo/pause")
    return Wish(path={"name": "echo"}, is_for_all=True)


@thing("POST /v1/queues/{name}/pause")
async def a_queue(at: Bench) -> Wish:
    await queued(at)
    return Wish(path={"name": "default"}, is_for_all=True)


@thing("POST /v1/queues/{name}/resume")
async def a_paused_queue(at: Bench) -> Wish:
    await queued(at)
    await sent(at.client, "/v1/queues/default/pause")
    return Wish(path={"name": "default"}, is_for_all=True)


@thing("GET /v1/pauses", "POST /v1/org/pause")
async def a_pause(at: Bench) -> Wish:
    await at.world.front.publish("of-one-org")
    await sent(at.client, "/v1/flows/of-one-org/pause")
    return Wish(makes=("of-one-org",))


async def limited(at: Bench, path: str = "/v1/limits") -> dict[str, str]:
    client = at.client
    if path != "/v1/limits":
        client = await at.world.client(await at.world.person(is_operator=True))
    response = await client.put(path, json={"key": "model:of-one-org", "maximum": 1})
    assert response.status_code == 200, response.text
    return {"key": "model:of-one-org", "kind": "concurrency"}


@thing("GET /v1/limits")
async def limits(at: Bench) -> Wish:
    return Wish(makes=((await limited(at))["key"],))


@thing("GET /v1/limits/saturation")
async def saturation(at: Bench) -> Wish:
    slug = at.world.slugs[at.world.org_id]
    return Wish(makes=(f'"{slug}"',), also=frozenset({"queues:read"}))


@thing("GET /v1/platform/limits/saturation")
async def platform_saturation(at: Bench) -> Wish:
    await queued(at)
    return Wish(makes=(f'"org {at.world.slugs[at.world.org_id]}"',))


@thing("GET /v1/limits/recorded-runs")
async def recorded_runs(at: Bench) -> Wish:
    run = await waiting(at, "fail", _fail, "run.failed")
    return Wish(makes=(run,), also=frozenset({"runs:read"}))


@thing("GET /v1/platform/limits/recorded-runs")
async def platform_recorded_runs(at: Bench) -> Wish:
    run = await waiting(at, "fail", _fail, "run.failed")
    return Wish(makes=(run.replace("-", ""),))


@thing("PUT /v1/limits", "PUT /v1/platform/limits")
async def a_new_limit(at: Bench) -> Wish:
    return Wish(json={"key": "model:m", "kind": "rate", "maximum": 2, "period_s": 1.0})


@thing("DELETE /v1/limits")
async def a_limit(at: Bench) -> Wish:
    return Wish(params=await limited(at))


@thing("GET /v1/platform/limits")
async def platform_limits(at: Bench) -> Wish:
    return Wish(makes=((await limited(at, "/v1/platform/limits"))["key"],))


@thing("DELETE /v1/platform/limits")
async def a_platform_limit(at: Bench) -> Wish:
    return Wish(params=await limited(at, "/v1/platform/limits"))


async def braked(at: Bench, owner: int) -> str:
    """Let a key cool down, of an org or (0) of everybody."""
    async with at.world.front.engine_db.duty("test") as con:
        await con.execute(
            "insert into brake (owner, key, until_us, factor, in_use, hits, over_us, step, reason)"
            " values ($1, 'provider:of-one-org', $2, 0.5, 1, 1, $2, 'ask', 'model_rate_limited')",
            *(owner, 2**52),
        )
    return "provider:of-one-org"


@thing("GET /v1/limits/brakes")
async def brakes(at: Bench) -> Wish:
    return Wish(makes=(await braked(at, at.world.org_id),))


@thing("DELETE /v1/limits/brakes")
async def a_brake(at: Bench) -> Wish:
    return Wish(params={"key": await braked(at, at.world.org_id)})


@thing("GET /v1/platform/limits/brakes")
async def platform_brakes(at: Bench) -> Wish:
    return Wish(makes=(await braked(at, 0),))


@thing("DELETE /v1/platform/limits/brakes")
async def a_platform_brake(at: Bench) -> Wish:
    return Wish(params={"key": await braked(at, 0)})


@thing("POST /v1/org/resume")
async def a_paused_org(at: Bench) -> Wish:
    await sent(at.client, "/v1/org/pause")
    return Wish()


async def schedule(at: Bench) -> str:
    await at.world.front.publish("echo")
    body = {"name": "nightly-of-one-org", "flow": "echo", "cron": "30 2 * * *"}
    made: str = (await sent(at.client, "/v1/schedules", **body))["id"]
    return made


@thing("GET /v1/schedules")
async def schedules(at: Bench) -> Wish:
    return Wish(makes=(await schedule(at), "nightly-of-one-org"))


@thing("POST /v1/schedules")
async def a_new_schedule(at: Bench) -> Wish:
    await at.world.front.publish("echo")
    body = {"name": "other", "flow": "echo", "cron": "30 2 * * *"}
    return Wish(json=body, also=frozenset({"runs:start"}))


@thing(
    "GET /v1/schedules/{schedule_id}",
    "DELETE /v1/schedules/{schedule_id}",
    "POST /v1/schedules/{schedule_id}/pause",
    "POST /v1/schedules/{schedule_id}/run_now",
)
async def a_schedule(at: Bench) -> Wish:
    return Wish(path={"schedule_id": await schedule(at)}, also=frozenset({"runs:start"}))


@thing("PATCH /v1/schedules/{schedule_id}")
async def a_changed_schedule(at: Bench) -> Wish:
    made = await schedule(at)
    return Wish(
        path={"schedule_id": made}, json={"cron": "@hourly"}, also=frozenset({"runs:start"})
    )


@thing("POST /v1/schedules/{schedule_id}/resume")
async def a_paused_schedule(at: Bench) -> Wish:
    made = await schedule(at)
    await sent(at.client, f"/v1/schedules/{made}/pause")
    return Wish(path={"schedule_id": made}, also=frozenset({"runs:start"}))


async def trigger(at: Bench) -> str:
    await at.world.front.publish("echo")
    body = {"name": "ship-of-one-org", "flow": "echo", "event": "order.placed"}
    made: str = (await sent(at.client, "/v1/triggers", **body))["id"]
    return made


@thing("GET /v1/triggers")
async def triggers(at: Bench) -> Wish:
    return Wish(makes=(await trigger(at), "ship-of-one-org"))


@thing("POST /v1/triggers")
async def a_new_trigger(at: Bench) -> Wish:
    await at.world.front.publish("echo")
    body = {"name": "other", "flow": "echo", "event": "order.placed"}
    return Wish(json=body, also=frozenset({"runs:start"}))


@thing(
    "GET /v1/triggers/{trigger_id}",
    "DELETE /v1/triggers/{trigger_id}",
    "POST /v1/triggers/{trigger_id}/pause",
)
async def a_trigger(at: Bench) -> Wish:
    return Wish(path={"trigger_id": await trigger(at)}, also=frozenset({"runs:start"}))


@thing("PATCH /v1/triggers/{trigger_id}")
async def a_changed_trigger(at: Bench) -> Wish:
    made = await trigger(at)
    return Wish(path={"trigger_id": made}, json={"priority": 3}, also=frozenset({"runs:start"}))


@thing("POST /v1/triggers/{trigger_id}/resume")
async def a_paused_trigger(at: Bench) -> Wish:
    made = await trigger(at)
    await sent(at.client, f"/v1/triggers/{made}/pause")
    return Wish(path={"trigger_id": made}, also=frozenset({"runs:start"}))


@thing("POST /v1/events")
async def an_event(at: Bench) -> Wish:
    return Wish(json={"name": "order.placed", "data": 1})


@thing("POST /v1/events/batch")
async def events(at: Bench) -> Wish:
    return Wish(json={"events": [{"name": "order.placed", "data": 1}]})


async def base(at: Bench) -> None:
    """Ingest a document, so that the base can be searched."""
    front = at.world.front
    front.registry.flows.clear()
    front.registry.add_flow(ingest)
    async with front.worker({KnowledgeStore: front.app.state.ports.knowledge}, index=2):
        response = await at.client.post(
            "/v1/knowledge-bases/shop-of-one-org/documents",
            params={"filename": "returns.md"},
            content=b"# Returns\n\nA kettle may be returned within 30 days of delivery.\n",
        )
        assert response.status_code == 202, response.text
        await front.ended(at.client, response.json()["id"])


@thing("GET /v1/knowledge-bases")
async def bases(at: Bench) -> Wish:
    await base(at)
    return Wish(makes=("shop-of-one-org",))


@thing("GET /v1/knowledge-bases/{name}/documents")
async def documents(at: Bench) -> Wish:
    await base(at)
    return Wish(path={"name": "shop-of-one-org"})


@thing("POST /v1/knowledge-bases/{name}/search")
async def a_search(at: Bench) -> Wish:
    await base(at)
    return Wish(path={"name": "shop-of-one-org"}, json={"query": "How long for a kettle?"})


@thing("POST /v1/knowledge-bases/{name}/documents")
async def a_document(at: Bench) -> Wish:
    await base(at)
    return Wish(
        path={"name": "shop-of-one-org"},
        params={"filename": "other.md"},
        content=b"# Other\n",
        is_for_all=True,
    )


async def joined(at: Bench, role: str = "viewer") -> str:
    """Seat somebody in the org."""
    return str((await at.world.member(role)).user_id)


@thing("GET /v1/org")
async def the_org(at: Bench) -> Wish:
    return Wish(makes=(f'"{at.world.slugs[at.world.org_id]}"',))


@thing("PATCH /v1/org")
async def a_changed_org(at: Bench) -> Wish:
    return Wish(json={"name": "Pond of one org"})


@thing("GET /v1/members")
async def members(at: Bench) -> Wish:
    return Wish(makes=(await joined(at),))


@thing("GET /v1/members/{user_id}", "DELETE /v1/members/{user_id}")
async def a_member(at: Bench) -> Wish:
    also = ROLES["viewer"] | {"members:write"}
    return Wish(path={"user_id": await joined(at)}, also=also)


@thing("PATCH /v1/members/{user_id}")
async def a_promoted_member(at: Bench) -> Wish:
    also = ROLES["support"]
    return Wish(path={"user_id": await joined(at)}, json={"role": "support"}, also=also)


@thing("GET /v1/roles")
async def roles(at: Bench) -> Wish:
    await _role(at)
    return Wish(makes=("reader-of-one-org",))


@thing("PUT /v1/roles/{name}")
async def a_new_role(at: Bench) -> Wish:
    body = {"permissions": ["runs:read"]}
    also = frozenset({"runs:read"})
    return Wish(path={"name": "other"}, json=body, also=also, is_for_all=True)


@thing("DELETE /v1/roles/{name}")
async def a_role(at: Bench) -> Wish:
    await _role(at)
    return Wish(path={"name": "reader-of-one-org"}, also=frozenset({"runs:read"}))


async def _role(at: Bench) -> None:
    response = await at.client.put(
        "/v1/roles/reader-of-one-org", json={"permissions": ["runs:read"]}
    )
    assert response.status_code < 300, response.text


async def invitation(at: Bench) -> str:
    body = {"email": "new@x.example", "role": "viewer"}
    made: str = (await sent(at.client, "/v1/invitations", **body))["id"]
    return made


@thing("GET /v1/invitations")
async def invitations(at: Bench) -> Wish:
    return Wish(makes=(await invitation(at), "new@x.example"))


@thing("POST /v1/invitations")
async def a_new_invitation(at: Bench) -> Wish:
    body = {"email": "other@x.example", "role": "viewer"}
    return Wish(json=body, also=ROLES["viewer"])


@thing(
    "GET /v1/invitations/{invitation_id}",
    "DELETE /v1/invitations/{invitation_id}",
    "POST /v1/invitations/{invitation_id}/resend",
)
async def an_invitation(at: Bench) -> Wish:
    return Wish(path={"invitation_id": await invitation(at)}, also=ROLES["viewer"])


async def service(at: Bench) -> str:
    body = {"name": "bot-of-one-org", "role": "viewer"}
    made: str = (await sent(at.client, "/v1/service-principals", **body))["id"]
    return made


@thing("GET /v1/service-principals")
async def services(at: Bench) -> Wish:
    return Wish(makes=(await service(at), "bot-of-one-org"))


@thing("POST /v1/service-principals")
async def a_new_service(at: Bench) -> Wish:
    return Wish(json={"name": "other", "role": "viewer"}, also=ROLES["viewer"])


@thing("GET /v1/service-principals/{service_id}")
async def a_service(at: Bench) -> Wish:
    return Wish(path={"service_id": await service(at)})


@thing("PATCH /v1/service-principals/{service_id}")
async def a_changed_service(at: Bench) -> Wish:
    made = await service(at)
    return Wish(path={"service_id": made}, json={"is_disabled": True}, also=ROLES["viewer"])


async def api_key(at: Bench) -> str:
    body = {"name": "key-of-one-org", "scopes": ["runs:read"]}
    made: str = (await sent(at.client, "/v1/api-keys", **body))["id"]
    return made


@thing("GET /v1/api-keys")
async def api_keys(at: Bench) -> Wish:
    return Wish(makes=(await api_key(at), "key-of-one-org"))


@thing("POST /v1/api-keys")
async def a_new_key(at: Bench) -> Wish:
    body = {"name": "other", "scopes": ["runs:read"]}
    return Wish(json=body, also=frozenset({"runs:read"}))


@thing("GET /v1/api-keys/{key_id}", "DELETE /v1/api-keys/{key_id}")
async def a_key(at: Bench) -> Wish:
    return Wish(path={"key_id": await api_key(at)})


async def issuer(at: Bench) -> str:
    body = {
        "name": "issuer-of-one-org",
        "url": "http://127.0.0.1:9/realm-of-one-org",
        "audiences": ["pond"],
        "rules": [{"claim": "roles", "values": ["users"], "role": "viewer"}],
    }
    made: str = (await sent(at.client, "/v1/issuers", **body))["id"]
    return made


@thing("GET /v1/issuers")
async def issuers(at: Bench) -> Wish:
    return Wish(makes=(await issuer(at), "realm-of-one-org"))


@thing("POST /v1/issuers")
async def a_new_issuer(at: Bench) -> Wish:
    rule = {"claim": "roles", "values": ["users"], "role": "viewer"}
    body = {"name": "x", "url": "http://127.0.0.1:9/x", "audiences": ["x"], "rules": [rule]}
    return Wish(json=body, also=ROLES["viewer"])


@thing(
    "GET /v1/issuers/{issuer_id}",
    "DELETE /v1/issuers/{issuer_id}",
    "POST /v1/issuers/{issuer_id}/test",
)
async def an_issuer(at: Bench) -> Wish:
    return Wish(path={"issuer_id": await issuer(at)}, also=ROLES["viewer"])


@thing("PATCH /v1/issuers/{issuer_id}")
async def a_changed_issuer(at: Bench) -> Wish:
    made = await issuer(at)
    return Wish(path={"issuer_id": made}, json={"is_disabled": True}, also=ROLES["viewer"])


async def outside_identity(at: Bench) -> str:
    identity_id: str = await at.world.owner.fetchval(
        """insert into outside_identity (org_id, identity_id, issuer, outside_subject, label, role)
           values ($1, gen_random_uuid(), 'http://127.0.0.1:9/x', 'ann-of-one-org', 'Ann', 'viewer')
           returning identity_id::text""",
        at.world.org_id,
    )
    return identity_id


@thing("GET /v1/outside-identities")
async def outside_identities(at: Bench) -> Wish:
    return Wish(makes=(await outside_identity(at), "ann-of-one-org"))


@thing("GET /v1/outside-identities/{identity_id}")
async def an_outside_identity(at: Bench) -> Wish:
    return Wish(path={"identity_id": await outside_identity(at)})


@thing("PATCH /v1/outside-identities/{identity_id}")
async def a_changed_outside_identity(at: Bench) -> Wish:
    made = await outside_identity(at)
    return Wish(path={"identity_id": made}, json={"is_disabled": True}, also=ROLES["viewer"])


async def grant(at: Bench) -> str:
    operator = await at.world.person(is_operator=True)
    body = {"operator_email": operator.email, "reason": "a look at one org", "hours": 1}
    made: str = (await sent(at.client, "/v1/grants", **body))["id"]
    return made


async def secret(at: Bench) -> str:
    body = {"name": "key-of-one-org", "value": "not to be seen by anybody"}
    made: str = (await sent(at.client, "/v1/secrets", **body))["id"]
    return made


@thing("GET /v1/secrets")
async def secrets(at: Bench) -> Wish:
    return Wish(makes=(await secret(at), "key-of-one-org"))


@thing("POST /v1/secrets")
async def a_new_secret(at: Bench) -> Wish:
    return Wish(json={"name": "other", "value": "also not to be seen"})


@thing("GET /v1/secrets/{name}", "DELETE /v1/secrets/{name}")
async def a_secret(at: Bench) -> Wish:
    await secret(at)
    return Wish(path={"name": "key-of-one-org"})


@thing("PUT /v1/secrets/{name}")
async def a_replaced_secret(at: Bench) -> Wish:
    await secret(at)
    return Wish(path={"name": "key-of-one-org"}, json={"value": "another one"}, is_for_all=True)


@thing("GET /v1/grants")
async def grants(at: Bench) -> Wish:
    return Wish(makes=(await grant(at), "a look at one org"))


@thing("POST /v1/grants")
async def a_new_grant(at: Bench) -> Wish:
    operator = await at.world.person(is_operator=True)
    body = {"operator_email": operator.email, "reason": "a look", "hours": 1}
    return Wish(json=body, also=ROLES["owner"])


@thing("GET /v1/grants/{grant_id}", "DELETE /v1/grants/{grant_id}")
async def a_grant(at: Bench) -> Wish:
    return Wish(path={"grant_id": await grant(at)}, also=ROLES["owner"])


@thing("GET /v1/audit", "GET /v1/audit/export")
async def a_log(at: Bench) -> Wish:
    return Wish(makes=(await grant(at),))


@thing("GET /v1/audit/verification")
async def a_verification(at: Bench) -> Wish:
    await grant(at)
    return Wish(is_own=True)


@thing("GET /v1/platform/orgs", "GET /v1/platform/operators", "GET /v1/platform/audit")
async def platform(at: Bench) -> Wish:
    return Wish()


@thing("POST /v1/platform/orgs")
async def a_new_org(at: Bench) -> Wish:
    return Wish(json={"slug": "brook", "name": "Brook"})


@thing("GET /v1/platform/orgs/{org_id}")
async def an_org(at: Bench) -> Wish:
    return Wish(path={"org_id": str(at.world.org_id)})


@thing("PATCH /v1/platform/orgs/{org_id}")
async def a_renamed_org(at: Bench) -> Wish:
    return Wish(path={"org_id": str(at.world.org_id)}, json={"name": "Pond"})


@thing("GET /v1/usage", "GET /v1/quotas")
async def own_usage(at: Bench) -> Wish:
    await queued(at)
    return Wish(is_own=True)


@thing("GET /v1/platform/plans", "GET /v1/platform/prices")
async def plans(at: Bench) -> Wish:
    return Wish()


@thing("PUT /v1/platform/plans/{name}")
async def a_new_plan(at: Bench) -> Wish:
    return Wish(path={"name": "small"}, json={"limits": {"runs_per_month": 10}})


@thing("DELETE /v1/platform/plans/{name}")
async def a_plan(at: Bench) -> Wish:
    async with at.world.front.db.globals() as con:
        await con.execute("insert into plan (plan) values ('old')")
    return Wish(path={"name": "old"})


@thing("GET /v1/platform/orgs/{org_id}/quotas")
async def quotas_of_an_org(at: Bench) -> Wish:
    return Wish(path={"org_id": str(at.world.org_id)})


@thing("PUT /v1/platform/orgs/{org_id}/plan")
async def a_plan_of_an_org(at: Bench) -> Wish:
    wish = {"plan": "unlimited", "overrides": {"runs_per_month": 1000}}
    return Wish(path={"org_id": str(at.world.org_id)}, json=wish)


@thing("PUT /v1/platform/prices/{model}")
async def a_new_price(at: Bench) -> Wish:
    return Wish(path={"model": "some/model"}, json={"input_micros": 1, "output_micros": 2})


@thing("DELETE /v1/platform/prices/{model}")
async def a_price(at: Bench) -> Wish:
    async with at.world.front.db.globals() as con:
        await con.execute("insert into model_price values ('some/model', 1, 2)")
    return Wish(path={"model": "some/model"})


@thing("POST /v1/platform/operators")
async def a_new_operator(at: Bench) -> Wish:
    return Wish(json={"email": (await at.world.person()).email})


@thing("DELETE /v1/platform/operators/{user_id}")
async def an_operator(at: Bench) -> Wish:
    await at.world.person(is_operator=True)
    operator = await at.world.person(is_operator=True)
    return Wish(path={"user_id": str(operator.user_id)})
