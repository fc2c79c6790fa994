"""A run acts only as long as whoever it acts for may: asked in the database before every step with an effect."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from millpond.engine.context import Context, StepContext, StepFailed
from millpond.engine.registry import Flow
from millpond.engine.submit import submit
from millpond.errors import Permanent
from millpond.identity.current_rights import CurrentRights
from millpond.types import Backing, new_id

from .conftest import Pond


@dataclass
class Gate:
    """Holds the first step of a run until the test has changed what somebody may."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    effects: list[str] = field(default_factory=list)


@dataclass
class Cast:
    """People and programs of the org, by the subject that runs act for."""

    pond: Pond
    user_id: uuid.UUID
    service_id: uuid.UUID
    key_id: uuid.UUID
    grant_id: uuid.UUID
    outside_id: uuid.UUID

    def subject(self, who: str) -> str:
        """Return the subject of one of them; an operator is the same person in the same org, lent."""
        kind = "user" if who == "operator" else who
        ids = {
            "user": self.user_id,
            "service": self.service_id,
            "key": self.key_id,
            "outside": self.outside_id,
        }
        return f"{kind}:{ids[kind]}"

    def backing(self, who: str, permission: str = "runs:start") -> Backing:
        """Return what a run of one of them stands on."""
        lent = self.grant_id if who == "operator" else None
        by = None if lent is None else "user:owner"
        return Backing(1, permission, lent, by)

    async def do(self, statement: str) -> None:
        """Change something in the org, or of it where no org is set."""
        is_of_platform = statement.startswith(("update account", "update org"))
        db = self.pond.db
        async with db.globals() if is_of_platform else db.org(self.pond.org_id) as con:
            await con.execute(statement)

    async def audited(self) -> list[dict[str, Any]]:
        """Read what the audit log tells of refusals."""
        async with self.pond.db.org(self.pond.org_id) as con:
            rows = await con.fetch("select * from audit where action = 'run.refused'")
        return [dict(row) for row in rows]


@pytest.fixture
async def cast(pond: Pond) -> Cast:
    """One of each kind with the role builder, and an operator whom a grant lets in to do what a builder does."""
    made = Cast(pond, new_id(), new_id(), new_id(), new_id(), new_id())
    org = pond.org_id
    async with pond.db.globals() as con:
        await con.execute(
            "insert into account (user_id, email, is_operator) values ($1, 'a@example.org', true)",
            made.user_id,
        )
    async with pond.db.org(org) as con:
        await con.execute(
            f"""
            insert into membership (org_id, user_id, role, added_by) values ({org}, '{made.user_id}', 'builder', 'x');
            insert into service_principal (org_id, service_id, name, role, created_by)
              values ({org}, '{made.service_id}', 'robot', 'builder', 'user:x');
            insert into api_key (org_id, key_id, name, prefix, digest, owner, scopes, created_by)
              values ({org}, '{made.key_id}', 'k', 'p', 'd', 'user:{made.user_id}', '{{runs:start}}', 'user:x');
            insert into access_grant (org_id, grant_id, operator_id, granted_by, reason, is_read_only, expires_at)
              values ({org}, '{made.grant_id}', '{made.user_id}', 'user:owner', 'look', false, now() + interval '1 h');
            insert into outside_identity (org_id, identity_id, issuer, outside_subject, role)
              values ({org}, '{made.outside_id}', 'https://i.example', 's', 'builder');
            insert into issuer (org_id, issuer_id, name, url, audiences, algorithms, created_by)
              values ({org}, '{new_id()}', 'i', 'https://i.example', '{{a}}', '{{RS256}}', 'user:x');
            """
        )
    return made


def two_effects(pond: Pond, gate: Gate, **options: Any) -> Flow:
    """Register a flow with an effect before the gate and one after it, which has options."""

    async def before(step: StepContext) -> None:
        gate.effects.append("before")
        gate.reached.set()
        await gate.opened.wait()

    async def after(step: StepContext) -> None:
        gate.effects.append("after")

    first, second = pond.step(before), pond.step(after, **options)

    async def acts(ctx: Context, _: None) -> str:
        await ctx.step(first)
        await ctx.step(second)
        return "done"

    return pond.flow(acts)


async def changed_between(
    cast: Cast, flow: Flow, gate: Gate, who: str, statement: str | None, **more: Any
) -> dict[str, Any]:
    """Run a flow for one of the cast, change something while it is at the gate, and return its row."""
    pond = cast.pond
    intent = pond.intent(flow, backing=cast.backing(who), **more)
    intent = type(intent)(**{**_fields(intent), "subject": cast.subject(who)})
    from millpond.engine.submit import submit

    async with pond.worker({"default": 5, "else": 5}):
        async with pond.db.org(pond.org_id) as con:
            await submit(con, [intent])
        pond.hints.wake(["default"])
        async with asyncio.timeout(20):
            await gate.reached.wait()
        if statement is not None:
            await cast.do(statement)
        gate.opened.set()
        return await pond.ended(intent.run_id)


def _fields(intent: Any) -> dict[str, Any]:
    return {name: getattr(intent, name) for name in type(intent).__dataclass_fields__}


TAKEN_AWAY = {
    "a member removed": ("user", "delete from membership", "not_a_member"),
    "a role lowered": (
        "user",
        "update membership set role = 'viewer', version = 2",
        "permission_gone",
    ),
    "an account disabled": ("user", "update account set disabled_at = now()", "account_disabled"),
    "an org suspended": ("user", "update org set suspended_at = now()", "org_suspended"),
    "a service disabled": (
        "service",
        "update service_principal set disabled_at = now()",
        "identity_disabled",
    ),
    "an outside identity disabled": (
        "outside",
        "update outside_identity set disabled_at = now()",
        "identity_disabled",
    ),
    "an outside identity without a role any more": (
        "outside",
        "update outside_identity set role = null",
        "identity_disabled",
    ),
    "an outside identity not seen for long": (
        "outside",
        "update outside_identity set seen_at = now() - interval '31 days'",
        "identity_disabled",
    ),
    "an outside issuer disabled": (
        "outside",
        "update issuer set disabled_at = now()",
        "identity_disabled",
    ),
    "an outside issuer removed": ("outside", "delete from issuer", "identity_disabled"),
    "a key revoked": ("key", "update api_key set revoked_at = now()", "key_ended"),
    "a key expired": ("key", "update api_key set expires_at = now() - interval '1 s'", "key_ended"),
    "a key narrowed": ("key", "update api_key set scopes = '{runs:read}'", "permission_gone"),
    "the owner of a key removed": ("key", "delete from membership", "not_a_member"),
    "a grant ended": ("operator", "update access_grant set ended_at = now()", "grant_ended"),
    "a grant made read-only": (
        "operator",
        "update access_grant set is_read_only = true",
        "permission_gone",
    ),
    "an operator no more": ("operator", "update account set is_operator = false", "grant_ended"),
}


@pytest.mark.parametrize("what", TAKEN_AWAY)
async def test_what_was_taken_away_keeps_the_next_step_from_acting(
    pond: Pond, cast: Cast, what: str
) -> None:
    who, statement, reason = TAKEN_AWAY[what]
    gate = Gate()
    row = await changed_between(cast, two_effects(pond, gate), gate, who, statement)
    assert gate.effects == ["before"]
    assert row["outcome"] == "failed"
    assert row["error"]["code"] == "right_revoked"
    (told,) = await cast.audited()
    assert told["subject"] == cast.subject(who)
    assert told["run_id"] == row["run_id"]
    assert told["granted_by"] == ("user:owner" if who == "operator" else None)
    assert f'"reason":"{reason}"' in told["details"]


@pytest.mark.parametrize("who", ["user", "service", "key", "outside", "operator"])
async def test_who_still_may_goes_on_also_with_another_version(
    pond: Pond, cast: Cast, who: str
) -> None:
    gate = Gate()
    bump = "update membership set version = 7, role = 'admin'"
    row = await changed_between(cast, two_effects(pond, gate), gate, who, bump)
    assert row["outcome"] == "succeeded"
    assert gate.effects == ["before", "after"]
    assert await cast.audited() == []


async def test_a_once_step_is_refused_before_its_marker(pond: Pond, cast: Cast) -> None:
    gate = Gate()
    flow = two_effects(pond, gate, effect="once")
    row = await changed_between(cast, flow, gate, "user", "delete from membership")
    assert gate.effects == ["before"]
    assert row["error"]["code"] == "right_revoked"
    assert await pond.count("input_request") == 0


async def test_a_pure_step_needs_no_right(pond: Pond, cast: Cast) -> None:
    gate = Gate()
    flow = two_effects(pond, gate, effect="pure")
    row = await changed_between(cast, flow, gate, "user", "delete from membership")
    assert row["outcome"] == "succeeded"


async def test_a_step_asks_for_its_own_permission_too(pond: Pond, cast: Cast) -> None:
    gate = Gate()
    flow = two_effects(pond, gate, permission="members:write")
    row = await changed_between(cast, flow, gate, "user", None)
    assert gate.effects == ["before"]
    (told,) = await cast.audited()
    assert '"permission":"members:write"' in told["details"]
    assert row["error"]["code"] == "right_revoked"


async def test_a_step_in_another_queue_is_refused_too(pond: Pond, cast: Cast) -> None:
    gate = Gate()
    flow = two_effects(pond, gate, queue="else")
    row = await changed_between(cast, flow, gate, "user", "delete from membership")
    assert gate.effects == ["before"]
    assert row["error"]["code"] == "right_revoked"
    assert len(await cast.audited()) == 1


async def test_no_child_is_started_and_what_was_done_is_undone(pond: Pond, cast: Cast) -> None:
    gate = Gate()

    async def give(step: StepContext) -> str:
        gate.reached.set()
        await gate.opened.wait()
        return "given"

    async def take_back(step: StepContext, what: str) -> None:
        gate.effects.append(f"undone {what}")

    given, undo = pond.step(give), pond.step(take_back)

    async def child(ctx: Context, _: None) -> None:
        gate.effects.append("child")

    below = pond.flow(child)
    caught: list[str] = []

    async def parent(ctx: Context, _: None) -> None:
        await ctx.step(given, undo=undo)
        try:
            await ctx.run_flow(below)
        except StepFailed as error:
            caught.append(error.code)
            raise

    row = await changed_between(cast, pond.flow(parent), gate, "user", "delete from membership")
    assert row["outcome"] == "failed"
    assert set(caught) == {"right_revoked"}
    assert gate.effects == ["undone given"]
    assert len(await cast.audited()) == 1


async def test_a_child_has_the_backing_of_its_parent(pond: Pond, cast: Cast) -> None:
    gate = Gate()
    gate.opened.set()
    flow = two_effects(pond, gate)

    async def above(ctx: Context, _: None) -> None:
        await ctx.run_flow(flow)

    row = await changed_between(cast, pond.flow(above), gate, "operator", None)
    assert row["outcome"] == "succeeded"
    async with pond.db.org(pond.org_id) as con:
        rows = await con.fetch("select distinct stamp, permission, lent, granted_by from run")
    assert [tuple(one) for one in rows] == [tuple(cast.backing("operator"))]


async def test_a_run_without_a_stamp_asks_nobody(pond: Pond) -> None:
    gate = Gate()
    gate.opened.set()
    flow = two_effects(pond, gate)
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["outcome"] == "succeeded"


async def test_what_was_done_is_undone_in_another_queue_too_when_the_right_is_gone(
    pond: Pond, cast: Cast
) -> None:
    gate = Gate()

    async def give(step: StepContext) -> str:
        gate.reached.set()
        await gate.opened.wait()
        return "given"

    async def take_back(step: StepContext, what: str) -> None:
        gate.effects.append(f"undone {what}")

    async def more(step: StepContext) -> None:
        gate.effects.append("more")

    given, undo, third = pond.step(give), pond.step(take_back, queue="else"), pond.step(more)

    async def parent(ctx: Context, _: None) -> None:
        await ctx.step(given, undo=undo)
        await ctx.step(third)

    row = await changed_between(cast, pond.flow(parent), gate, "user", "delete from membership")
    assert row["outcome"] == "failed"
    assert gate.effects == ["undone given"]
    assert len(await cast.audited()) == 1


async def test_a_scheduled_run_gets_no_permission_that_a_step_needs(pond: Pond, cast: Cast) -> None:
    gate = Gate()
    gate.opened.set()
    flow = two_effects(pond, gate, permission="members:write")
    intent = replace(pond.intent(flow), subject="service:schedule:nightly")
    async with pond.db.org(pond.org_id) as con:
        await submit(con, [intent])
    async with pond.worker():
        row = await pond.ended(intent.run_id)
    assert (row["outcome"], gate.effects) == ("failed", ["before"])
    (told,) = await cast.audited()
    assert "nobody_behind" in told["details"]


async def test_steps_wait_while_rights_cannot_be_known_for_whatever_reason(
    pond: Pond, cast: Cast, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [Permanent("no privilege", code="database_privilege"), RuntimeError("odd")]
    held = CurrentRights.held

    async def failing(self: Any, holders: Any) -> Any:
        if failures:
            raise failures.pop()
        return await held(self, holders)

    monkeypatch.setattr(CurrentRights, "held", failing)
    gate = Gate()
    gate.opened.set()
    row = await changed_between(cast, two_effects(pond, gate), gate, "user", None)
    assert (row["outcome"], gate.effects, failures) == ("succeeded", ["before", "after"], [])
