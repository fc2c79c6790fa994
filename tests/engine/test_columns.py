"""Joined columns hold what was joined, row by row, or nothing at all."""

from __future__ import annotations

import pytest
from tests.engine.conftest import Pond

from millpond.engine.columns import optional, plain, texts
from millpond.errors import InvalidInput


async def parted(pond: Pond, joined: str, cast: str = "text") -> list[object]:
    async with pond.engine_db.duty("test") as con:
        return await con.fetchval(  # type: ignore[no-any-return]
            f"select string_to_array($1, chr(30), '')::{cast}[]", joined
        )


async def test_the_server_parts_what_was_joined(pond: Pond) -> None:
    values = ['{"a":"\\u001e"}', "ü\n\t'\"", None, "null"]
    assert await parted(pond, optional(values)) == values
    assert await parted(pond, plain([-1, 2**62, 0]), "bigint") == [-1, 2**62, 0]
    assert await parted(pond, texts(["one"])) == ["one"]


@pytest.mark.parametrize("values", [["a\x1eb"], ["a", "\x1e"], ["\x1e", "a", "b"]])
def test_a_value_with_the_separator_is_refused(values: list[str]) -> None:
    with pytest.raises(InvalidInput):
        texts(values)
