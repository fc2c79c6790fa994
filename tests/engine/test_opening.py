"""Secrets that runs open: handed to steps, hidden in whatever the run leaves behind, and refused where nobody may."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import uuid
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

import pytest
import structlog
from tests.engine.test_rights import Cast, cast

from millpond.cli.logs import configure_logging
from millpond.db.pool import Database
from millpond.engine import opening, recording, reruns, step_tries
from millpond.engine.checking import check
from millpond.engine.context import Context, StepContext, StepFailed
from millpond.engine.submit import submit
from millpond.errors import Forbidden, InvalidInput, NotFound, Permanent, Transient
from millpond.identity import secret_store
from millpond.identity.resealing import rotate
from millpond.identity.ring import KeyRing
from millpond.identity.seal import KEY_BYTES, Seal
from millpond.identity.vault import Vault
from millpond.retry import Retry
from millpond.types import Principal

from .conftest import Pond

__all__ = ["cast"]

CANARY = 'c4nary/"Zoë\\ 77+=.end'
SHOWN = "[secret:stripe]"
FORMS = [
    CANARY,
    json.dumps(CANARY)[1:-1],
    json.dumps(json.dumps(CANARY)[1:-1])[1:-1],
    json.dumps(CANARY, ensure_ascii=False)[1:-1],
    quote(CANARY, safe=""),
    base64.b64encode(CANARY.encode()).decode()[:24],
    base64.b64encode(b":" + CANARY.encode()).decode()[2:26],
    base64.b64encode(b"u:" + CANARY.encode()).decode()[3:26],
]
TABLES = "select c.relname from pg_class c where c.relnamespace = 'millpond'::regnamespace and c.relkind = 'r'"


@pytest.fixture
async def ring() -> KeyRing:
    return KeyRing(Seal(bytes(KEY_BYTES)))


@pytest.fixture
async def pond(pond: Pond, ring: KeyRing) -> Pond:
    """A pond whose workers open secrets; the org has one."""
    pond.vault = Vault(pond.db, ring)
    await put(pond.db, ring, pond.org_id, CANARY)
    return pond


async def put(db: Database, ring: KeyRing, org_id: int, value: str, name: str = "stripe") -> None:
    async with db.globals() as con:
        await ring.current(con)  # as every process does at its start
    async with db.org(org_id) as con:
        await secret_store.put(con, ring, Principal(org_id=org_id, subject="user:t"), name, value)


async def assert_nowhere(pond: Pond) -> None:
    """Look for the value, in every form, in every row of every table."""
    async with pond.engine_db.duty("test") as con:
        tables = [row["relname"] for row in await con.fetch(TABLES)]
    found, unread = [], set(tables)
    for table in tables:
        for database in (pond.db.org(pond.org_id), pond.engine_db.duty("test")):
            try:
                async with database as con:
                    rows = await con.fetch(f'select t::text as row from "{table}" t')
            except Permanent as error:
                if error.code != "database_privilege":
                    raise
                continue
            unread.discard(table)
            found += [
                (table, form, row["row"]) for row in rows for form in FORMS if form in row["row"]
            ]
    assert found == []
    assert unread == set()  # each is read by one role or both


async def opened(pond: Pond, run_id: uuid.UUID) -> list[Any]:
    return [event.data for event in await pond.events(run_id) if event.kind == "secret.opened"]


async def test_a_step_gets_the_value_and_the_run_keeps_its_name_alone(pond: Pond) -> None:
    seen: list[str] = []

    async def charge(step: StepContext) -> str:
        value = await step.secret("stripe")
        seen.append(value)
        await step.emit("charging", {"with": f"Bearer {value}"})
        return f"charged with {value}"

    charging = pond.step(charge)

    async def order(ctx: Context, _: Any) -> Any:
        told = await ctx.step(charging)
        await ctx.emit("done", {"key": await ctx.secret("stripe")})
        await ctx.set_state("shown", {await ctx.secret("stripe"): 1})
        return {"told": told, "url": f"https://x.example/?k={quote(CANARY, safe='')}"}

    flow = pond.flow(order)
    async with pond.worker():
        run_id = await pond.submit(flow)
        ended = await pond.ended(run_id)
    assert seen == [CANARY]
    assert ended["output"] == {
        "told": f"charged with {SHOWN}",
        "url": f"https://x.example/?k={SHOWN}",
    }
    assert await opened(pond, run_id) == [{"name": "stripe", "version": 1}]
    progress = [e.data for e in await pond.events(run_id) if e.kind == "progress"]
    assert progress == [
        {"with": f"Bearer {SHOWN}", "name": "charging"},
        {"key": SHOWN, "name": "done"},
    ]
    await assert_nowhere(pond)


async def test_what_a_flow_gets_of_a_step_is_what_a_replay_gives_it(pond: Pond) -> None:
    got: list[str] = []

    async def leak() -> str:
        return CANARY

    async def order(ctx: Context, _: Any) -> None:
        await ctx.secret("stripe")
        got.append(await ctx.step("leak", leak))
        await ctx.sleep(1.1)

    flow = pond.flow(order)
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["outcome"] == "succeeded"
    assert got == [SHOWN, SHOWN]
    assert len(await opened(pond, run_id)) == 1


async def test_errors_of_steps_and_of_the_flow_show_nothing(pond: Pond) -> None:
    async def break_off(step: StepContext) -> None:
        value = await step.secret("stripe")
        raise Permanent(f"401 for {value}", code="refused", advice=f"not {quote(value)}")

    breaking = pond.step(break_off)

    async def order(ctx: Context, _: Any) -> None:
        try:
            await ctx.step(breaking)
        except StepFailed as error:
            assert CANARY not in str(error)  # noqa: PT017
        raise ValueError("x" * 1990 + await ctx.secret("stripe"))

    flow = pond.flow(order, retry=Retry(max_tries=1))
    async with pond.worker():
        run_id = await pond.submit(flow)
        error = (await pond.ended(run_id))["error"]
    # Cut only after it was hidden: no part of a value is left at the end.
    assert error["message"] == ("x" * 1990 + SHOWN)[:2000]
    [failed] = [e.data for e in await pond.events(run_id) if e.kind == "step.failed"]
    assert failed["error"]["message"] == f"401 for {SHOWN}"
    assert failed["error"]["advice"] == f"not {SHOWN}"
    await assert_nowhere(pond)


async def test_what_leaves_a_run_for_others_shows_nothing(pond: Pond) -> None:
    """Inputs of children, questions, and the run that goes on; as an argument elsewhere it is refused."""
    refused: list[str] = []

    async def far(step: StepContext, words: str) -> str:
        return f"{words} and {await step.secret('stripe')}"

    sent = pond.step(far, queue="other")

    async def child(ctx: Context, data: Any) -> Any:
        return data

    kid = pond.flow(child)

    async def order(ctx: Context, data: Any) -> Any:
        value = await ctx.secret("stripe")
        if data == "again":
            return value
        try:
            await ctx.step(sent, f"got {value}")
        except InvalidInput as error:
            refused.append(error.code)
        told = [await ctx.step(sent, "got it")]
        told.append(await ctx.run_flow(kid, {"k": value}, labels={"k": value}))
        decision = await ctx.ask_human(
            "ok", role="support", form={}, title=f"Use {value}?", proposal={"k": value},
            expires_in_s=0.05, default={},
        )  # fmt: skip
        assert decision.is_expired
        assert told == [f"got it and {SHOWN}", {"k": SHOWN}]
        await ctx.continue_as("again")
        return None

    flow = pond.flow(order)
    async with pond.worker({"default": 5, "other": 2}):
        run_id = await pond.submit(flow)
        ended = await pond.ended(run_id)
        assert ended["outcome"] == "succeeded", ended["error"]
        assert (await pond.ended(ended["continued_to"]))["output"] == SHOWN
    assert set(refused) == {"secret_in_argument"}
    await assert_nowhere(pond)


async def test_a_later_attempt_hides_what_an_earlier_one_opened(pond: Pond) -> None:
    """Another worker, which opens nothing itself, meets the value as an echo from outside."""

    async def use(step: StepContext) -> None:
        assert await step.secret("stripe") == CANARY

    async def echo() -> str:
        return f"you sent {CANARY}"

    async def far_echo(step: StepContext) -> str:
        return f"you sent {CANARY}"

    using, far = pond.step(use), pond.step(far_echo, queue="other")

    async def order(ctx: Context, _: Any) -> Any:
        await ctx.step(using)
        await ctx.sleep(1.1)
        return [await ctx.step("echo", echo), await ctx.step(far)]

    flow = pond.flow(order)
    async with pond.worker({"default": 5, "other": 5}):
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["output"] == [f"you sent {SHOWN}"] * 2
    await assert_nowhere(pond)


async def test_endings_hide_too_and_undo_opens(pond: Pond) -> None:
    async def undo_it(step: StepContext, result: str) -> str:
        return f"undone with {await step.secret('stripe')}"

    undoing = pond.step(undo_it)

    async def book() -> str:
        return "booked"

    async def told(ctx: Context, _: Any, failure: Any) -> None:
        await ctx.emit("sorry", {"key": CANARY})

    async def order(ctx: Context, _: Any) -> None:
        await ctx.secret("stripe")
        await ctx.step("book", book, undo=undoing)
        raise Permanent("no", code="no")

    flow = pond.flow(order, on_failure=told)
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["outcome"] == "failed"
    [sorry] = [e.data for e in await pond.events(run_id) if e.kind == "progress"]
    assert sorry["key"] == SHOWN
    await assert_nowhere(pond)


async def test_an_ending_goes_the_way_that_a_body_went_by_its_secrets(
    pond: Pond, ring: KeyRing
) -> None:
    """Its replay gets the same values, and the same refusals, as the flow did."""
    await put(pond.db, ring, pond.org_id, json.dumps({"kind": "gold", "more": "x" * 9}), "gcp")
    await put(pond.db, ring, pond.org_id, "it is gone later", "gone")
    undone: list[str] = []

    async def undo_it(step: StepContext, result: str) -> None:
        undone.append(result)

    async def book() -> str:
        return "booked"

    undoing = pond.step(undo_it)

    async def order(ctx: Context, _: Any) -> None:
        kind = json.loads(await ctx.secret("gcp"))["kind"]
        await ctx.secret("gone")
        try:
            await ctx.secret("missing")
        except NotFound:
            await ctx.step(f"book {kind} without", book, undo=undoing)
        async with pond.db.org(pond.org_id) as con:
            await con.execute("delete from secret where name = 'gone'")
        raise Permanent("no", code="no")

    flow = pond.flow(order)
    async with pond.worker():
        run_id = await pond.submit(flow)
        ended = await pond.ended(run_id)
    assert (ended["outcome"], ended["error"]["code"]) == ("failed", "no")
    assert undone == ["booked"]
    assert [one["name"] for one in await opened(pond, run_id)] == ["gcp", "gone"]


async def test_a_check_of_a_history_gets_names_in_place_of_values(pond: Pond) -> None:
    got: list[str] = []

    async def order(ctx: Context, _: Any) -> None:
        got.append(await ctx.secret("stripe"))

    flow = pond.flow(order)
    async with pond.worker():
        await pond.ended(await pond.submit(flow))
    found = [one async for one in check(pond.engine_db, [flow], {}, limit=10)]
    assert [one.comparison.result for one in found] == ["ok"]
    assert got == [CANARY, SHOWN]


async def test_threads_open_and_tell_behind_the_veil(pond: Pond) -> None:
    def work(step: StepContext) -> str:
        value = step.secret_in_thread("stripe")
        step.emit_soon("working", {"key": value})
        own = threading.Thread(target=step.emit_soon, args=("own", {"key": value}))
        own.start()
        own.join()
        return value

    working = pond.step(work)

    async def order(ctx: Context, _: Any) -> Any:
        return await ctx.step(working)

    flow = pond.flow(order)
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["output"] == SHOWN
    shown = {e.data["name"]: e.data["key"] for e in await pond.events(run_id) if "key" in e.data}
    assert shown == {"working": SHOWN, "own": SHOWN}
    await assert_nowhere(pond)


async def test_a_step_on_the_loop_is_refused_what_would_block_it(pond: Pond) -> None:
    async def work(step: StepContext) -> str:
        return step.secret_in_thread("stripe")

    working = pond.step(work)

    async def order(ctx: Context, _: Any) -> Any:
        return await ctx.step(working)

    flow = pond.flow(order)
    async with asyncio.timeout(20), pond.worker():
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["error"]["code"] == "not_in_a_thread"


async def test_text_that_comes_in_pieces_is_hidden_across_them(pond: Pond) -> None:
    async def speak(step: StepContext) -> None:
        value = await step.secret("stripe")
        stream = step.veiled()
        text = f"the key is {value}, really"
        for at in range(0, len(text), 3):
            await step.emit("delta", {"text": stream.feed(text[at : at + 3])})
        await step.emit("delta", {"text": stream.end()})

    speaking = pond.step(speak)

    async def order(ctx: Context, _: Any) -> None:
        await ctx.step(speaking)

    flow = pond.flow(order)
    async with pond.worker():
        run_id = await pond.submit(flow)
        await pond.ended(run_id)
    told = [e.data["text"] for e in await pond.events(run_id) if e.kind == "progress"]
    assert "".join(told) == f"the key is {SHOWN}, really"


async def test_logs_of_a_run_hide_what_it_opened_and_others_are_left_alone(pond: Pond) -> None:
    stream = io.StringIO()
    configure_logging("info", process="test", stream=stream)
    log = structlog.get_logger("flows")
    is_open, is_over = asyncio.Event(), asyncio.Event()

    async def order(ctx: Context, _: Any) -> None:
        value = await ctx.secret("stripe")
        log.info("calling", url=f"https://x.example/?k={quote(value, safe='')}", parts=[value])
        await asyncio.to_thread(log.info, f"from a thread {value}")
        bare = threading.Thread(target=log.info, args=(f"from a bare thread {value}",))
        bare.start()
        bare.join()
        is_open.set()
        await is_over.wait()

    async def other(ctx: Context, _: Any) -> None:
        await is_open.wait()
        log.info("other", text=CANARY)
        is_over.set()

    try:
        one, two = pond.flow(order), pond.flow(other)
        async with pond.worker():
            first = await pond.submit(one)
            await pond.submit(two)
            await pond.ended(first)
    finally:
        structlog.reset_defaults()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    [calling] = [line for line in lines if line["event"] == "calling"]
    assert calling["url"] == f"https://x.example/?k={SHOWN}"
    assert calling["parts"] == [SHOWN]
    assert any(line["event"] == f"from a thread {SHOWN}" for line in lines)
    assert any(line["event"] == f"from a bare thread {SHOWN}" for line in lines)
    # Only what a run opened itself is hidden: another run's line tells nothing by what it lacks.
    assert [line["text"] for line in lines if line["event"] == "other"] == [CANARY]


async def test_a_name_that_shows_a_value_is_refused(pond: Pond, ring: KeyRing) -> None:
    await put(pond.db, ring, pond.org_id, "plainkey0123", "plain")

    async def order(ctx: Context, _: Any) -> None:
        value = await ctx.secret("plain")
        await ctx.emit(f"used {value}")

    flow = pond.flow(order, retry=Retry(max_tries=1))
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["error"]["code"] == "secret_in_name"


async def test_a_name_that_was_recorded_before_its_value_was_opened_is_found_again(
    pond: Pond, ring: KeyRing
) -> None:
    await put(pond.db, ring, pond.org_id, "plainkey0123", "plain")
    attempts: list[int] = []

    async def work() -> int:
        return 7

    async def order(ctx: Context, _: Any) -> Any:
        attempts.append(ctx.attempt)
        first = await ctx.step("plainkey0123", work)
        await ctx.secret("plain")
        try:
            await ctx.step("plainkey0123", work)
        except InvalidInput as error:
            await ctx.emit("refused", {"code": error.code})
        await ctx.sleep(1.1)
        return first

    flow = pond.flow(order, retry=Retry(max_tries=1))
    async with pond.worker():
        run_id = await pond.submit(flow)
        ended = await pond.ended(run_id)
    assert (ended["outcome"], ended["output"]) == ("succeeded", 7), ended["error"]
    assert len(attempts) == 2
    told = [e.data["code"] for e in await pond.events(run_id) if e.kind == "progress"]
    assert told == ["secret_in_name"]


async def test_the_undo_of_a_step_whose_name_came_to_show_a_value_is_done(
    pond: Pond, ring: KeyRing
) -> None:
    await put(pond.db, ring, pond.org_id, "plainkey0123", "plain")
    undone: list[str] = []

    async def work(step: StepContext) -> str:
        return "made"

    async def remove(step: StepContext, made: str) -> None:
        undone.append(made)

    async def order(ctx: Context, _: Any) -> None:
        await ctx.step(make, undo=undo)
        await ctx.secret("plain")
        raise Permanent("it ends here")

    make, undo = pond.step(work, name="make plainkey0123"), pond.step(remove)
    flow = pond.flow(order, retry=Retry(max_tries=1))
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["outcome"] == "failed"
    assert undone == ["made"]


async def test_an_undo_whose_own_name_shows_a_value_is_done(pond: Pond, ring: KeyRing) -> None:
    """The name stands in the code, and what is promised to be undone is undone."""
    await put(pond.db, ring, pond.org_id, "plainkey0123", "plain")
    undone: list[str] = []

    async def work(step: StepContext) -> str:
        return "made"

    async def remove(step: StepContext, made: str) -> None:
        undone.append(made)

    async def order(ctx: Context, _: Any) -> None:
        await ctx.secret("plain")
        await ctx.step(make, undo=undo)
        raise Permanent("it ends here")

    make, undo = pond.step(work), pond.step(remove, name="remove plainkey0123")
    flow = pond.flow(order, retry=Retry(max_tries=1))
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["outcome"] == "failed"
    assert undone == ["made"]
    assert "run.ending_failed" not in [one.kind for one in await pond.events(run_id)]


async def test_what_follows_a_failure_is_refused_a_name_that_shows_a_value(
    pond: Pond, ring: KeyRing
) -> None:
    await put(pond.db, ring, pond.org_id, "plainkey0123", "plain")

    async def after(ctx: Context, _: Any, failure: Any) -> None:
        await ctx.step(tell)

    async def say(step: StepContext) -> None:
        pass

    async def order(ctx: Context, _: Any) -> None:
        await ctx.secret("plain")
        raise Permanent("it ends here")

    tell = pond.step(say, name="tell plainkey0123")
    flow = pond.flow(order, retry=Retry(max_tries=1), on_failure=after)
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["outcome"] == "failed"
    told = [one.data for one in await pond.events(run_id) if one.kind == "run.ending_failed"]
    assert [one["error"]["code"] for one in told] == ["secret_in_name"]


async def test_an_unknown_secret_fails_at_once_and_is_not_told_to_be_opened(pond: Pond) -> None:
    async def order(ctx: Context, _: Any) -> None:
        await ctx.secret("missing")

    flow = pond.flow(order)
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["error"]["code"] == "secret_not_found"
    assert await opened(pond, run_id) == []


async def test_a_worker_without_a_vault_opens_nothing(pond: Pond) -> None:
    pond.vault = None

    async def order(ctx: Context, _: Any) -> None:
        await ctx.secret("stripe")

    flow = pond.flow(order)
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["error"]["code"] == "no_secrets_here"


async def test_another_orgs_secret_does_not_exist(pond: Pond, other_org: int) -> None:
    async def order(ctx: Context, _: Any) -> None:
        await ctx.secret("stripe")

    flow = pond.flow(order)
    async with pond.worker():
        run_id = await pond.submit(flow, org_id=other_org)
        async with asyncio.timeout(20):
            while True:
                async with pond.db.org(other_org) as con:
                    row = await con.fetchrow(
                        "select outcome, error->>'code' as code from run where run_id = $1", run_id
                    )
                if row["outcome"]:
                    break
                await asyncio.sleep(0.05)
    assert row["code"] == "secret_not_found"


async def test_a_rerun_tells_of_its_own_openings(pond: Pond) -> None:
    async def order(ctx: Context, _: Any) -> None:
        await ctx.secret("stripe")

    flow = pond.flow(order)
    async with pond.worker():
        first = await pond.submit(flow)
        await pond.ended(first)
        async with pond.db.org(pond.org_id) as con:
            source = await reruns.read(con, pond.org_id, first)
            repeat = reruns.Repeat(
                version=1, timeout_s=None, subject="user:test", input="null", keeps_all=True
            )
            second = (await reruns.rerun(con, source, repeat)).run_id
        pond.hints.wake(["default"])
        await pond.ended(second)
    assert len(await opened(pond, second)) == 1


async def acting(pond: Pond, cast: Cast, who: str) -> tuple[uuid.UUID, dict[str, Any]]:
    """Run a flow that opens the secret in its body and in a step, for somebody; returns what came of it."""

    async def use(step: StepContext) -> str:
        return await step.secret("stripe")

    using = pond.step(use, effect="pure")

    async def order(ctx: Context, _: Any) -> Any:
        try:
            await ctx.step(using)
        except StepFailed as error:
            await ctx.emit("refused", {"code": error.code})
        return await ctx.secret("stripe")

    flow = pond.flow(order)
    intent = replace(pond.intent(flow), subject=cast.subject(who), backing=cast.backing(who))
    async with pond.worker():
        async with pond.db.org(pond.org_id) as con:
            await submit(con, [intent])
        pond.hints.wake(["default"])
        return intent.run_id, await pond.ended(intent.run_id)


async def test_a_run_under_a_grant_opens_nothing_and_that_is_audited(
    pond: Pond, cast: Cast
) -> None:
    run_id, ended = await acting(pond, cast, "operator")
    assert (ended["error"]["class"], ended["error"]["code"]) == ("Forbidden", "secret_lent")
    [refused] = [e.data for e in await pond.events(run_id) if e.kind == "progress"]
    assert refused["code"] == "secret_lent"
    [row] = await cast.audited()
    assert row["run_id"] == run_id
    assert row["granted_by"] == "user:owner"
    assert json.loads(row["details"])["reason"] == "secret_lent"
    assert await opened(pond, run_id) == []
    async with pond.db.org(pond.org_id) as con:
        assert await con.fetchval("select used_at from secret") is None


async def test_a_run_under_a_grant_opens_nothing_at_its_end_either(pond: Pond, cast: Cast) -> None:
    async def undo_it(step: StepContext, result: str) -> str:
        return await step.secret("stripe")

    async def book() -> str:
        return "booked"

    undoing = pond.step(undo_it)

    async def order(ctx: Context, _: Any) -> None:
        await ctx.step("book", book, undo=undoing)
        raise Permanent("no", code="no")

    flow = pond.flow(order)
    intent = replace(
        pond.intent(flow), subject=cast.subject("operator"), backing=cast.backing("operator")
    )
    async with pond.worker():
        async with pond.db.org(pond.org_id) as con:
            await submit(con, [intent])
        pond.hints.wake(["default"])
        await pond.ended(intent.run_id)
    [told] = [e.data for e in await pond.events(intent.run_id) if e.kind == "step.failed"]
    assert told["error"]["code"] == "secret_lent"
    assert await opened(pond, intent.run_id) == []


async def test_what_an_ending_of_a_run_under_a_grant_starts_opens_nothing(
    pond: Pond, cast: Cast
) -> None:
    """It needs no right, and is still a run under that grant, as are its own children and successors."""
    seen: list[str] = []
    acted: list[str] = []

    async def act(step: StepContext) -> None:
        acted.append(step.subject)

    acting = pond.step(act)

    async def kid(ctx: Context, depth: int) -> None:
        await ctx.step(acting)
        try:
            await ctx.secret("stripe")
        except Forbidden as error:
            seen.append(error.code)
        if depth == 0:
            await ctx.run_flow("kid", 1)
        if depth == 1:
            await ctx.continue_as(2)

    pond.flow(kid)

    async def told(ctx: Context, _: Any, failure: Any) -> None:
        await ctx.run_flow("kid", 0)

    async def order(ctx: Context, _: Any) -> None:
        raise Permanent("no", code="no")

    flow = pond.flow(order, on_failure=told)
    intent = replace(
        pond.intent(flow), subject=cast.subject("operator"), backing=cast.backing("operator")
    )
    # The grant ends, and what is to be undone is undone all the same.
    await cast.do("update access_grant set ended_at = clock_timestamp()")
    async with pond.worker():
        async with pond.db.org(pond.org_id) as con:
            await submit(con, [intent])
        pond.hints.wake(["default"])
        await pond.ended(intent.run_id)
    assert set(seen) == {"secret_lent"}
    assert acted == [cast.subject("operator")] * 3
    assert await pond.count("step", "kind = 'secret'") == 0


@pytest.mark.parametrize("who", ["user", "service", "key", "outside"])
async def test_whoever_may_act_has_secrets_opened_without_a_right_to_list_them(
    pond: Pond, cast: Cast, who: str
) -> None:
    _, ended = await acting(pond, cast, who)
    assert ended["output"] == SHOWN, ended["error"]


async def test_a_run_whose_subject_is_gone_opens_nothing(pond: Pond, cast: Cast) -> None:
    await cast.do(f"delete from membership where user_id = '{cast.user_id}'")
    run_id, ended = await acting(pond, cast, "user")
    assert ended["error"]["code"] == "right_revoked"
    assert await opened(pond, run_id) == []


async def test_a_vault_that_is_away_is_waited_for(pond: Pond, ring: KeyRing) -> None:
    asked: list[int] = []
    real = Vault(pond.db, ring)

    class Away:
        async def open(self, org_id: int, name: str, *, is_use: bool = True) -> Any:
            asked.append(1)
            if len(asked) < 3:
                raise Transient("away")
            return await real.open(org_id, name, is_use=is_use)

    pond.vault = Away()

    async def order(ctx: Context, _: Any) -> Any:
        return await ctx.secret("stripe")

    flow = pond.flow(order)
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["output"] == SHOWN
    assert len(asked) == 3


NEWER = Seal(b"n" * KEY_BYTES)


@dataclass
class Late:
    """A host that is given its installation's new key late."""

    pond: Pond
    seals: list[Seal] = field(default_factory=lambda: [Seal(bytes(KEY_BYTES))])

    def ring(self) -> KeyRing:
        return KeyRing(*self.seals, read=lambda: list(self.seals))

    async def rotate(self) -> None:
        """Turn the installation to a key that this host does not have."""
        await rotate(self.pond.db, KeyRing(NEWER, *self.seals))

    async def given(self, run_id: uuid.UUID, kind: str) -> None:
        """Wait until the work was handed back, and give the key."""
        told = await self.pond.until(run_id, kind)
        assert told.data["reason"] == "away"
        self.seals.insert(0, NEWER)


@pytest.fixture
def late(pond: Pond, monkeypatch: pytest.MonkeyPatch) -> Late:
    late = Late(pond)
    pond.vault = Vault(pond.db, late.ring())
    monkeypatch.setattr(opening, "_ELSEWHERE_S", 0.1)
    monkeypatch.setattr(recording, "AGAIN_S", 0.01)
    monkeypatch.setattr(step_tries, "AGAIN_S", 0.01)
    return late


async def test_a_host_without_the_new_key_hands_a_run_back(pond: Pond, late: Late) -> None:
    async def order(ctx: Context, _: Any) -> Any:
        return await ctx.secret("stripe")

    await late.rotate()
    flow = pond.flow(order)
    async with pond.worker():
        run_id = await pond.submit(flow)
        await late.given(run_id, "run.released")
        assert (await pond.ended(run_id))["output"] == SHOWN


async def test_a_host_without_the_new_key_hands_a_step_back(pond: Pond, late: Late) -> None:
    async def far(step: StepContext) -> str:
        return await step.secret("stripe")

    sent = pond.step(far, queue="other")

    async def order(ctx: Context, _: Any) -> Any:
        return await ctx.step(sent)

    await late.rotate()
    flow = pond.flow(order)
    async with pond.worker({"default": 5, "other": 2}):
        run_id = await pond.submit(flow)
        await late.given(run_id, "step.released")
        assert (await pond.ended(run_id))["output"] == SHOWN


async def test_a_host_without_the_new_key_does_not_go_on_unveiled(pond: Pond, late: Late) -> None:
    async def echo() -> str:
        return CANARY

    async def order(ctx: Context, _: Any) -> Any:
        await ctx.secret("stripe")
        if ctx.attempt == 1:
            await late.rotate()
        await ctx.sleep(1.1)
        return await ctx.step("echo", echo)

    flow = pond.flow(order)
    async with pond.worker():
        run_id = await pond.submit(flow)
        await late.given(run_id, "run.released")
        assert (await pond.ended(run_id))["output"] == SHOWN
    await assert_nowhere(pond)


async def test_a_used_secret_tells_when(pond: Pond) -> None:
    async def order(ctx: Context, _: Any) -> None:
        await ctx.secret("stripe")

    flow = pond.flow(order)
    async with pond.worker():
        await asyncio.gather(*[pond.ended(await pond.submit(flow)) for _ in range(5)])
    async with pond.db.org(pond.org_id) as con:
        assert await con.fetchval("select used_at > now() - interval '1 minute' from secret")
