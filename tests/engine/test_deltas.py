"""Text that steps show while they go on: gathered, fenced, veiled, gone when the whole is recorded."""

from __future__ import annotations

import asyncio
import itertools
import threading
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from tests.engine.conftest import DEADLINE_S, Pond

from millpond import veil
from millpond.engine import deltas
from millpond.engine.context import Context, StepContext
from millpond.engine.deltas import MAX_BYTES, Deltas
from millpond.engine.events import Event, tail_with_text
from millpond.engine.growing import Delta, Reader
from millpond.engine.leases import Lease
from millpond.engine.registry import Flow, Registry
from millpond.errors import Transient
from millpond.retry import Retry

SECRET = "sk-0123456789abcdef"


def followed(pond: Pond, run_id: uuid.UUID) -> AsyncIterator[Event | Delta]:
    return tail_with_text(pond.db, pond.feed, pond.org_id, run_id, Reader())


async def whole(pond: Pond, run_id: uuid.UUID) -> list[Event | Delta]:
    async with asyncio.timeout(DEADLINE_S):
        return [one async for one in followed(pond, run_id)]


async def told_to_the_first(pond: Pond, flow: Flow) -> list[Event | Delta]:
    """Return what somebody is told who follows a run before it begins: later nobody gets text of what is over."""
    told: list[Event | Delta] = []
    run_id = await pond.submit(flow)
    async with asyncio.timeout(DEADLINE_S), AsyncExitStack() as stack:
        async for one in followed(pond, run_id):
            if not told:
                await stack.enter_async_context(pond.worker())
            told.append(one)
    return told


async def first_text(pond: Pond, run_id: uuid.UUID) -> Delta:
    async with asyncio.timeout(DEADLINE_S):
        async for one in followed(pond, run_id):
            if isinstance(one, Delta):
                return one
    raise AssertionError("the run ended without text")


def words(told: list[Event | Delta]) -> list[str]:
    """Name what was told, in order: kinds of events about steps, and text."""
    kept = [one for one in told if isinstance(one, Delta) or one.kind.startswith("step.")]
    shown = [one.text if isinstance(one, Delta) else one.kind for one in kept]
    return [one for one in shown if one != "step.started"]  # told of where a step takes a while


@pytest.mark.parametrize("place", ["here", "elsewhere", "thread"])
async def test_text_is_shown_while_its_step_goes_on_and_the_result_has_all_of_it(
    pond: Pond, place: str
) -> None:
    go = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def speak(step: StepContext) -> str:
        step.delta("Hello ")
        step.delta("dear ")
        await go.wait()
        step.delta("world")
        return "Hello dear world"

    def speak_in_thread(step: StepContext) -> str:
        step.delta("Hello ")
        step.delta("dear ")
        assert asyncio.run_coroutine_threadsafe(go.wait(), loop).result(DEADLINE_S)
        step.delta("world")
        return "Hello dear world"

    queue = {"queue": "llm"} if place == "elsewhere" else {}
    function = speak_in_thread if place == "thread" else speak
    step = pond.step(function, name="speak", **queue)

    async def talk(ctx: Context, _: None) -> str:
        return await ctx.step(step)

    flow = pond.flow(talk)
    told: list[Event | Delta] = []
    async with pond.worker({"default": 2, "llm": 2}), asyncio.timeout(DEADLINE_S):
        run_id = await pond.submit(flow)
        async for one in followed(pond, run_id):
            told.append(one)
            go.set() if isinstance(one, Delta) else None
    shown = [one for one in told if isinstance(one, Delta)]
    assert [one.text for one in shown] == ["Hello dear ", "world"]
    assert [(one.tries, one.n) for one in shown] == [(1, 1), (1, 2)]
    assert words(told)[-3:] == ["Hello dear ", "world", "step.succeeded"]
    numbers = [one.event_no for one in told if isinstance(one, Event)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert (await pond.run_row(run_id))["output"] == "Hello dear world"
    # Whoever comes later finds the record, not its pieces.
    assert not any(isinstance(one, Delta) for one in await whole(pond, run_id))


async def test_whoever_comes_later_gets_what_is_there_of_steps_that_go_on(pond: Pond) -> None:
    go = asyncio.Event()

    async def short(step: StepContext) -> None:
        step.delta("over")

    async def long(step: StepContext) -> None:
        step.delta("going ")
        await go.wait()

    one, other = pond.step(short), pond.step(long)

    async def talk(ctx: Context, _: None) -> None:
        await ctx.step(one)
        await ctx.step(other)

    flow = pond.flow(talk)
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert (await first_text(pond, run_id)).text in ("over", "going ")
        async with asyncio.timeout(DEADLINE_S):
            while await pond.count("delta", "text = 'going '") == 0:
                await asyncio.sleep(0.01)
        assert await pond.count("delta", "text = 'over'") == 1
        for _ in range(2):
            assert (await first_text(pond, run_id)).text == "going "
        go.set()
        await pond.ended(run_id)


async def test_each_try_has_text_of_its_own_before_the_event_of_its_end(pond: Pond) -> None:
    numbers = itertools.count(1)

    async def stumble(step: StepContext) -> int:
        number = next(numbers)
        step.delta(f"try {number}")
        if number < 3:
            raise Transient("later")
        return number

    step = pond.step(stumble, retry=Retry(base_s=0.01, cap_s=0.01))

    async def talk(ctx: Context, _: None) -> int:
        return await ctx.step(step)

    flow = pond.flow(talk)
    told = await told_to_the_first(pond, flow)
    assert words(told) == [
        "try 1",
        "step.retrying",
        "try 2",
        "step.retrying",
        "try 3",
        "step.succeeded",
    ]
    assert [one.tries for one in told if isinstance(one, Delta)] == [1, 2, 3]


async def test_a_secret_is_hidden_however_it_comes_in_pieces(pond: Pond) -> None:
    async def leak(step: StepContext) -> str:
        step.delta("the key ")  # before anything is to be hidden
        current = veil.current()
        assert current is not None
        current.add("stripe", SECRET)
        for piece in ("is ", SECRET[:5], SECRET[5:11]):
            step.delta(piece)
            await asyncio.sleep(0.15)  # a row for each, were it shown
        step.delta(SECRET[11:] + " they say")
        return "done"

    step = pond.step(leak)

    async def talk(ctx: Context, _: None) -> str:
        return await ctx.step(step)

    flow = pond.flow(talk)
    told = await told_to_the_first(pond, flow)
    text = "".join(one.text for one in told if isinstance(one, Delta))
    assert text == "the key is [secret:stripe] they say"


async def test_what_veils_text_knows_secrets_that_are_opened_later(pond: Pond) -> None:
    async def leak(step: StepContext) -> str:
        stream = step.veiled()
        current = veil.current()
        assert current is not None
        current.add("stripe", SECRET)
        return stream.feed(SECRET[:7]) + stream.feed(SECRET[7:]) + stream.end()

    step = pond.step(leak)

    async def talk(ctx: Context, _: None) -> int:
        return len(await ctx.step(step))

    flow = pond.flow(talk)
    async with pond.worker():
        run_id = await pond.submit(flow)
        assert (await pond.ended(run_id))["output"] == len("[secret:stripe]")


async def test_nothing_is_written_without_the_lease(pond: Pond) -> None:
    hold = asyncio.Event()

    async def speak(step: StepContext) -> None:
        step.delta("mine")
        await hold.wait()

    step = pond.step(speak)

    async def talk(ctx: Context, _: None) -> None:
        await ctx.step(step)

    flow = pond.flow(talk)
    others = Deltas(pond.engine_db, pond.hints)
    async with pond.worker():
        run_id = await pond.submit(flow)
        await first_text(pond, run_id)
        stranger = Lease(pond.org_id, run_id, run_id, 1, uuid.uuid4())
        text = others.open(stranger, "speak:0", 1, None)
        text.feed("not mine")
        async with asyncio.timeout(DEADLINE_S):
            await text.end()
        text.feed("nor this")
        assert await pond.count("delta") == 1
        hold.set()
        await pond.ended(run_id)
    await others.close()


async def test_the_fence_waits_for_no_number_of_the_run(pond: Pond) -> None:
    """Text and events of one run are stored side by side: neither takes the other's number or order."""

    async def speak(step: StepContext) -> None:
        for number in range(30):
            step.delta(f"{number} ")
            await step.emit("counted", {"number": number})

    step = pond.step(speak)

    async def talk(ctx: Context, _: None) -> None:
        await ctx.parallel(*(ctx.step(step) for _ in range(4)))

    flow = pond.flow(talk)
    async with pond.worker():
        runs = [await pond.submit(flow) for _ in range(4)]
        told = await asyncio.gather(*(whole(pond, run_id) for run_id in runs))
    for one in told:
        numbers = [event.event_no for event in one if isinstance(event, Event)]
        assert numbers == list(range(1, len(numbers) + 1))
        by_step: dict[str, str] = {}
        for delta in one:
            if isinstance(delta, Delta):
                by_step[delta.step_key] = by_step.get(delta.step_key, "") + delta.text
        assert list(by_step.values()) == ["".join(f"{n} " for n in range(30))] * 4


async def test_not_more_is_shown_than_a_limit_and_what_text_cannot_hold_is_left_out(
    pond: Pond,
) -> None:
    async def speak(step: StepContext) -> int:
        step.delta("a\0b\ud800c")
        for _ in range(5):
            step.delta("ä" * 40_000)
        return 5

    step = pond.step(speak)

    async def talk(ctx: Context, _: None) -> int:
        return await ctx.step(step)

    flow = pond.flow(talk)
    told = await told_to_the_first(pond, flow)
    text = "".join(one.text for one in told if isinstance(one, Delta))
    assert text.startswith("ab?cä")
    assert MAX_BYTES - 2 <= len(text.encode()) <= MAX_BYTES
    assert (await pond.run_row(told[0].run_id))["output"] == 5


async def test_text_is_removed_once_its_try_is_over_and_not_before(
    pond: Pond, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "KEEP_S", 0.0)
    go = asyncio.Event()

    async def speak(step: StepContext) -> None:
        step.delta("short-lived")
        await go.wait()

    step = pond.step(speak)

    async def talk(ctx: Context, _: None) -> None:
        await ctx.step(step)
        await asyncio.Event().wait()

    flow = pond.flow(talk)
    async with pond.worker():
        run_id = await pond.submit(flow)
        await first_text(pond, run_id)
        await deltas.forget(pond.engine_db)
        assert await pond.count("delta") == 1
        async with pond.engine_db.duty("test") as con:  # as a worker left it that lost its lease
            await con.execute(
                "insert into delta (org_id, run_id, step_key, attempt, tries, n, item_id, text)"
                " values ($1, $2, 'speak:0', 0, 1, 1, $2, 'stale')",
                pond.org_id,
                run_id,
            )
        assert (await first_text(pond, run_id)).text == "short-lived"
        await deltas.forget(pond.engine_db)
        assert await pond.count("delta", "text = 'stale'") == 0
        assert await pond.count("delta") == 1
        go.set()
        await pond.until(run_id, "step.succeeded")
        await deltas.forget(pond.engine_db)
        assert await pond.count("delta") == 0


async def test_what_goes_on_after_its_step_shows_nothing_more(pond: Pond) -> None:
    late, said, is_followed = threading.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    async def leave(step: StepContext) -> None:
        # Whoever comes after the try is told nothing of its text.
        await is_followed.wait()
        step.delta("in time")

        def dawdle() -> None:
            late.wait(DEADLINE_S)
            step.delta("too late")
            loop.call_soon_threadsafe(said.set)

        threading.Thread(target=dawdle).start()

    step = pond.step(leave)

    async def talk(ctx: Context, _: None) -> None:
        await ctx.step(step)
        late.set()
        await said.wait()

    flow, told = pond.flow(talk), []
    async with pond.worker(), asyncio.timeout(DEADLINE_S):
        async for one in followed(pond, await pond.submit(flow)):
            is_followed.set()
            told.append(one)
    assert words([one for one in told if getattr(one, "kind", "") != "step.started"]) == [
        "in time",
        "step.succeeded",
    ]
    assert await pond.count("delta", "text = 'too late'") == 0


async def test_a_secret_parted_by_what_text_cannot_hold_is_hidden(pond: Pond) -> None:
    assert await _shown_of(pond, [SECRET[:6] + "\0" + SECRET[6:], " they say"]) == (
        "the key is [secret:stripe] they say"
    )


async def test_the_beginning_of_a_secret_at_which_a_text_breaks_off_is_hidden(pond: Pond) -> None:
    assert await _shown_of(pond, [SECRET[:-1]]) == "the key is [secret:stripe]"
    assert await _shown_of(pond, [SECRET[:5]]) == "the key is " + SECRET[:5]


async def _shown_of(pond: Pond, pieces: list[str]) -> str:
    """Return what is shown of a step that tells these pieces, knowing SECRET."""

    async def leak(step: StepContext) -> str:
        current = veil.current()
        assert current is not None
        current.add("stripe", SECRET)
        for piece in ("the key is ", *pieces):
            step.delta(piece)
        return "done"

    pond.registry = Registry()
    step = pond.step(leak)

    async def talk(ctx: Context, _: None) -> str:
        return await ctx.step(step)

    flow = pond.flow(talk)
    told = await told_to_the_first(pond, flow)
    return "".join(one.text for one in told if isinstance(one, Delta))


async def test_a_known_outcome_of_a_once_step_waits_for_no_text(pond: Pond) -> None:
    """While text cannot be stored the flow's own time limit passes: what was done is recorded all the same."""
    done, locked = asyncio.Event(), asyncio.Event()

    async def pay(step: StepContext) -> str:
        await locked.wait()
        step.delta("paying")
        done.set()
        return "receipt"

    step = pond.step(pay, effect="once")

    async def buy(ctx: Context, _: None) -> str:
        try:
            async with asyncio.timeout(0.5):
                return await ctx.step(step)
        except TimeoutError:
            return "timed out"

    flow = pond.flow(buy)
    async with pond.worker():
        run_id = await pond.submit(flow)
        await pond.until(run_id, "step.started")
        async with pond.engine_db.duty("hold") as con:
            await con.execute("select from item where item_id = $1 for update", run_id)
            locked.set()
            await done.wait()
            await asyncio.sleep(1.0)
        row = await pond.ended(run_id)
    async with pond.engine_db.duty("test") as con:
        stored = await con.fetchrow("select state, output from step where run_id = $1", run_id)
    assert stored is not None
    assert (row["output"], stored["state"], stored["output"]) == ("receipt", "done", '"receipt"')
