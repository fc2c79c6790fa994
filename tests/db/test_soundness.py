"""What the tables themselves refuse, whoever writes: rows whose columns do not go together."""

from __future__ import annotations

import uuid
from itertools import product

import asyncpg

STATES = ("scheduled", "queued", "running", "waiting", "awaiting_input")
KINDS = ("run", "step")
ITEM = """
insert into millpond.item (org_id, item_id, run_id, state, kind, token, step_key, lane_id, rank)
values (1, $1, $1, $2, $3, $4, $5, 0, 0)
"""


def is_sound(state: str, kind: str, token: uuid.UUID | None, step_key: str | None) -> bool:
    """Tell what a live row has to be: a token's while it runs and only then, a step's with its key and only then."""
    return (
        state in STATES
        and kind in KINDS
        and (state == "running") == (token is not None)
        and (kind == "step") == (step_key is not None)
    )


async def refused_by(con: asyncpg.Connection, statement: str, *given: object) -> str | None:
    """Return the check that refuses a statement; None where it was done."""
    try:
        await con.execute(statement, *given)
    except asyncpg.CheckViolationError as error:
        return error.constraint_name
    return None


async def test_a_live_row_goes_together_or_is_refused(admin_url: str) -> None:
    con = await asyncpg.connect(admin_url)
    states, kinds = (*STATES, "", "Running", "done"), (*KINDS, "", "RUN")
    tokens, step_keys = (None, uuid.uuid4()), (None, "", "main:a:1")
    stored = 0
    try:
        for row in product(states, kinds, tokens, step_keys):
            refusal = await refused_by(con, ITEM, uuid.uuid4(), *row)
            assert refusal == (None if is_sound(*row) else "item_is_sound"), row
            stored += refusal is None
    finally:
        await con.close()
    assert stored == len(STATES) * 3  # of a run without a key, of a step with either


async def test_a_change_that_breaks_a_live_row_is_refused(admin_url: str) -> None:
    con = await asyncpg.connect(admin_url)
    change = "update millpond.item set "
    try:
        await con.execute(ITEM, uuid.uuid4(), "queued", "run", None, None)
        for broken in (
            "state = 'running'",
            "token = gen_random_uuid()",
            "kind = 'step'",
            "step_key = 'main:a:1'",
            "state = 'succeeded'",
        ):
            assert await refused_by(con, change + broken) == "item_is_sound", broken
        await con.execute(change + "state = 'running', token = gen_random_uuid()")
    finally:
        await con.close()
