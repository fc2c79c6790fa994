"""Named SQL: every statement has one name, one comment line, and is one that Postgres accepts."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import asyncpg
import pytest

from millpond.db import queries as named

FOLDER = Path(str(files("millpond.db"))) / "sql"
ROOMS = sorted(path.stem for path in FOLDER.glob("*.sql"))


@pytest.mark.parametrize("room", ROOMS)
def test_every_statement_says_in_one_line_what_it_is_for(room: str) -> None:
    found = named.queries(room)
    assert found
    for name, text in found.items():
        first, second, *_ = [*text.splitlines(), ""]
        assert first.startswith("-- "), (room, name)
        assert not first.startswith("-- name"), (room, name)
        assert not second.startswith("-- "), (room, name)


@pytest.mark.parametrize("room", ROOMS)
async def test_every_statement_fits_the_schema(room: str, admin_url: str) -> None:
    con = await asyncpg.connect(admin_url, server_settings={"search_path": "millpond, public"})
    for name, text in named.queries(room).items():
        try:
            await con.prepare(text)
        except asyncpg.PostgresError as error:
            pytest.fail(f"{room}.{name}: {error}")
    await con.close()


@pytest.mark.parametrize("room", ROOMS)
def test_no_row_comes_back_without_a_column(room: str) -> None:
    """asyncpg 0.32 keeps such a row for the next one by a word that it writes behind it, into what is anybody's memory.

    Python's own allocator has just that room left there; others, such as the system's, have not.
    """
    for name, text in named.queries(room).items():
        assert not re.search(r"(?m)^select\s+from\b", text), (room, name)


def test_a_name_may_stand_once_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sql").mkdir()
    twice = "-- name: pick\n-- Picks.\nselect 1;\n-- name: pick\n-- Picks.\nselect 2;\n"
    (tmp_path / "sql" / "made.sql").write_text(twice)
    monkeypatch.setattr(named, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match="two statements named pick"):
        named.queries("made")


async def test_the_claim_takes_work_as_the_function_does_that_claims_at_once(
    admin_url: str,
) -> None:
    """One text in two places: a function copies each row that it returns, and the short way is one."""
    con = await asyncpg.connect(admin_url)
    body = await con.fetchval("select prosrc from pg_proc where proname = 'claim_take'")
    names = await con.fetchval("select proargnames from pg_proc where proname = 'claim_take'")
    types = await con.fetchval(
        "select array(select format_type(t, null) from unnest(proargtypes) t) from pg_proc where proname = 'claim_take'"
    )
    await con.close()
    _, _, function = body.partition("return query")
    function = function.rpartition("end")[0].replace("claim_take.", "")
    statement = named.queries("claim")["take"].partition("\n")[2]
    given = re.compile(
        r"string_to_array\(\$(\d+), chr\(30\)\)(?:::(\w+\[\]))?|\$(\d+)::(\w+(?:\[\])?)"
    )
    short = {"float8[]": "double precision[]", "bool[]": "boolean[]"}

    def named_of(one: re.Match[str]) -> str:
        nth = int(one[1] or one[3]) - 1
        cast = one[2] or one[4] or "text[]"
        assert short.get(cast, cast) == types[nth], names[nth]
        return str(names[nth])

    statement = given.sub(named_of, statement)
    assert statement.rstrip(";").split() == function.rstrip().rstrip(";").split()
