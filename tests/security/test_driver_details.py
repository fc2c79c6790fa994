"""What a driver or Postgres says of a failing statement stays in `db`: no statement, parameter or detail comes out."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest
import structlog
from tests.engine.conftest import Pond, pond
from tests.security.conftest import World

from millpond.cli.logs import configure_logging
from millpond.db.pool import Database
from millpond.engine.context import Context
from millpond.errors import MillpondError
from millpond.retry import Retry

__all__ = ["pond"]

CANARIES = (
    "c4nary-parameter",
    "c4nary-detail",
    "c4nary-hint",
    "c4nary-words",
    "c4nary_column",
    "select",
)
RAISING = """
create function c4nary() returns trigger language plpgsql as $$
begin
  raise exception 'c4nary-words' using detail = 'c4nary-detail', hint = 'c4nary-hint', column = 'c4nary_column',
    errcode = '{code}';
end $$;
create trigger c4nary before insert or update on secret for each row execute function c4nary();
"""
# Of each kind of error that the server sends: what it is sorted as, and something that provokes it.
STATEMENTS = {
    "a value that does not fit": "select $1::text::int as c4nary_column",
    "a missing table": "select $1::text from c4nary_column",
    "a check": "insert into org (slug, name) values ('NOT A SLUG ' || $1::text, 'x')",
    "too long an answer": "select repeat($1::text, 1000000000)",
    "a division": "select length($1::text) / 0",
    "a syntax": "select $1::text c4nary_column from from",
    "a cast of JSON": "select ('{\"' || $1::text)::json",
    "a raise": "do $$ begin raise exception 'c4nary-words' using detail = 'c4nary-detail'; end $$",
}


def assert_clean(text: str) -> None:
    assert [one for one in CANARIES if one in text] == [], text


@pytest.fixture
def logged() -> Any:
    """What is logged, as the product logs it."""
    stream = io.StringIO()
    configure_logging("debug", process="test", stream=stream)
    yield stream
    structlog.reset_defaults()
    logging.getLogger().handlers = []


@pytest.mark.parametrize(
    "code", ["P0001", "22023", "23514", "40001", "42501", "53100", "57014", "XX000"]
)
async def test_the_api_tells_nothing_of_what_postgres_said(
    world: World, logged: io.StringIO, code: str
) -> None:
    await world.owner.execute(RAISING.format(code=code))
    owner = await world.owner_of(world.org_id)
    answer = await owner.put("/v1/secrets/name", json={"value": "c4nary-parameter"})
    assert answer.status_code >= 400
    assert_clean(answer.text)
    assert_clean(logged.getvalue())


@pytest.mark.parametrize("kind", STATEMENTS)
async def test_a_run_tells_nothing_of_what_postgres_said(
    pond: Pond, logged: io.StringIO, kind: str
) -> None:
    statement = STATEMENTS[kind]

    async def ask() -> None:
        async with pond.db.globals() as con:
            await con.execute(statement, *(["c4nary-parameter"] if "$1" in statement else []))

    async def order(ctx: Context, _: Any) -> None:
        await ctx.step("ask", ask, retry=Retry(max_tries=1))

    flow = pond.flow(order, retry=Retry(max_tries=1))
    async with pond.worker():
        run_id = await pond.submit(flow)
        error = (await pond.ended(run_id))["error"]
    assert error["step"] == "ask"
    assert_clean(json.dumps(error))
    assert_clean(json.dumps([event.data for event in await pond.events(run_id)]))
    assert_clean(logged.getvalue())


@pytest.mark.parametrize("kind", STATEMENTS)
async def test_the_error_itself_shows_nothing(db: Database, kind: str) -> None:
    statement = STATEMENTS[kind]
    with pytest.raises(MillpondError) as caught:
        async with db.globals() as con:
            await con.execute(statement, *(["c4nary-parameter"] if "$1" in statement else []))
    error = caught.value
    assert_clean(f"{error} {error!r} {error.details} {error.advice} {error.param}")
