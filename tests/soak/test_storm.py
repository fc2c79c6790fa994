"""Minutes of storm: workers killed and stopped, Postgres restarted, and nothing lost or repeated.

`make soak` runs it for five minutes; `MILLPOND_SOAK_S` names another length.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.crash.oracle import check
from tests.crash.sink import opened
from tests.crash.storm import sky

LENGTH_S = float(os.environ.get("MILLPOND_SOAK_S", "300"))


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_nothing_is_lost_or_repeated_in_a_long_storm(data_dir: Path) -> None:
    async with opened() as sink, sky(data_dir, sink) as (storm, people, engine_db):
        await storm.rage(LENGTH_S)
        await check(engine_db, sink, people.accepted, claims_may_be_lost=True)
    assert len(people.accepted) >= 5 * LENGTH_S
    assert storm.toll["kills"] >= LENGTH_S / 20
    assert storm.toll["stops"] >= LENGTH_S / 20
    assert storm.toll["restarts"] >= LENGTH_S / 60
    print(f"{len(people.accepted)} runs; {dict(storm.toll)}")
