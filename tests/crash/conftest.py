"""The database and people of the crash tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from tests.crash.sink import Sink, opened
from tests.crash.workload import People
from tests.engine.conftest import pond as pond

from millpond.db.pool import Database


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    """A sink that lives as long as the test."""
    async with opened() as sink:
        yield sink


@pytest.fixture
async def people(db: Database, org: int, sink: Sink) -> AsyncIterator[People]:
    """People who answer and cancel until the test ends."""
    people = People(db, org, sink)
    deciding = asyncio.create_task(people.decide())
    yield people
    deciding.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await deciding
