"""A short storm: what was accepted ends exactly once, whatever is killed, stopped and restarted."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.crash.oracle import check
from tests.crash.sink import Sink
from tests.crash.storm import sky

LENGTH_S = 22.0


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_nothing_is_lost_or_repeated_in_a_short_storm(data_dir: Path, sink: Sink) -> None:
    async with sky(data_dir, sink) as (storm, people, engine_db):
        await storm.rage(LENGTH_S)
        await check(engine_db, sink, people.accepted, claims_may_be_lost=True)
    assert len(people.accepted) >= 10
    assert storm.toll.keys() >= {"kills", "stops", "restarts"}
