"""Values above 256 KiB stand apart and come back as they were; above 16 MiB they are refused."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest
from tests.engine.conftest import Pond
from tests.engine.test_faults import _lease, _step

from millpond.engine.commit import FinishWrite
from millpond.engine.context import Context, StepContext, StepFailed
from millpond.engine.payloads import INLINE_BYTES, MAX_BYTES, is_big
from millpond.engine.questions import resolve
from millpond.errors import InvalidInput, LeaseLost
from millpond.types import Principal


def test_size_is_counted_in_bytes() -> None:
    assert not is_big("x" * INLINE_BYTES)
    assert is_big("x" * (INLINE_BYTES + 1))
    assert is_big("\U0001f99f" * (INLINE_BYTES // 4 + 1))
    assert not is_big("\U0001f99f" * (INLINE_BYTES // 4))
    assert not is_big(None)


async def test_big_values_take_the_whole_road_and_are_replayed(pond: Pond) -> None:
    calls: list[int] = []

    async def double(text: str) -> str:
        calls.append(len(text))
        return text * 2

    async def remote(step: StepContext, text: str) -> str:
        return text + "!"

    step = pond.step(remote, queue="sql")

    async def grow(ctx: Context, text: str) -> str:
        grown = await ctx.step("double", double, text)
        await ctx.sleep(1.1)
        return await ctx.step(step, grown)

    flow = pond.flow(grow)
    text = "ü" * (200 * 1024)
    async with pond.worker({"default": 5, "sql": 2}):
        ids = [await pond.submit(flow, text), await pond.submit(flow, "small")]
        rows = [await pond.ended(run_id) for run_id in ids]
    assert rows[0]["input"] is None
    assert rows[0]["output"] is None
    assert rows[1]["output"] == "smallsmall!"
    assert sorted(calls) == [5, 200 * 1024]
    async with pond.db.org(pond.org_id) as con:
        stored = await con.fetch(
            "select run_id, slot, body #>> '{}' as text from payload order by slot"
        )
    assert {row["run_id"] for row in stored} == {ids[0]}
    found = {row["slot"]: row["text"] for row in stored}
    assert found == {
        "input": text,
        "step:double:0": text * 2,
        "args:remote:0": found["args:remote:0"],
        "step:remote:0": text * 2 + "!",
        "output": text * 2 + "!",
    }
    assert await pond.count("step", "octet_length(output::text) > 262144") == 0


async def test_a_big_value_of_a_lost_lease_is_not_stored(pond: Pond) -> None:
    big = '"' + "x" * INLINE_BYTES + '"'
    async with _lease(pond, 2) as ([lease, lost], committer):
        stale = lost._replace(token=uuid.uuid4())
        writes = [
            committer.record(_step(lease, big)),
            committer.record(_step(stale, big)),
            committer.record(_step(lease, "1", key="t:0")),
        ]
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert [type(one) for one in results] == [type(None), LeaseLost, type(None)]
        for one, kind in ((stale, LeaseLost), (lease, type(None))):
            end = FinishWrite(lease=one, outcome="succeeded", output=big, event_data="{}")
            [result] = await asyncio.gather(committer.finish(end), return_exceptions=True)
            assert isinstance(result, kind)
    assert await pond.count("payload", "slot = 'step:s:0'") == 1
    assert await pond.count("payload", "slot = 'output'") == 1
    assert await pond.count("payload") == 2


async def test_what_is_over_the_limit_is_refused_with_its_field_and_both_sizes(pond: Pond) -> None:
    async def big(ctx: Context, _: Any) -> str:
        async def make() -> str:
            return "x" * MAX_BYTES

        try:
            return await ctx.step("make", make)
        except StepFailed as error:
            return f"{error.code}: {error.message}"

    async def bigger(ctx: Context, _: Any) -> str:
        return "x" * MAX_BYTES

    flow, other = pond.flow(big), pond.flow(bigger)
    with pytest.raises(InvalidInput) as refused:
        await pond.submit(flow, "x" * MAX_BYTES)
    assert refused.value.param == "input"
    assert f"{MAX_BYTES + 2} bytes" in str(refused.value)
    assert f"at most {MAX_BYTES} " in str(refused.value)
    async with pond.worker():
        row = await pond.ended(await pond.submit(flow))
        failed = await pond.ended(await pond.submit(other))
    assert row["output"].startswith("value_too_large: the output")
    assert failed["outcome"] == "failed"
    assert failed["error"]["code"] == "value_too_large"


async def test_big_answers_of_humans_stand_apart_and_reach_their_steps(pond: Pond) -> None:
    text = "ö" * (200 * 1024)

    async def lose(step: StepContext) -> str:
        raise RuntimeError("nobody knows")

    lost = pond.step(lose, effect="once")

    async def ask(ctx: Context, kind: str) -> int:
        if kind == "outcome":
            return len(await ctx.step(lost))
        form = {"type": "string"}
        return len((await ctx.ask_human("which", role="operator", form=form)).answer)

    flow = pond.flow(ask)
    kim = Principal(org_id=0, subject="user:kim", roles=frozenset({"operator"}))
    async with pond.worker():
        for kind, answer in (
            ("question", text),
            ("outcome", {"outcome": "done", "output": text}),
        ):
            run_id = await pond.submit(flow, kind)
            event = await pond.until(run_id, "input.requested")
            async with pond.db.org(pond.org_id) as con:
                request_id = uuid.UUID(event.data["request_id"])
                readied = await resolve(con, pond.org_id, request_id, kim, answer)
            pond.hints.wake([readied.queue])
            assert (await pond.ended(run_id))["output"] == len(text)
            assert await pond.count("payload", f"run_id = '{run_id}'") == 1
            assert await pond.count("step", f"run_id = '{run_id}' and output is not null") == 0
