"""Limits at the other end: a stand-in for a provider counts what arrives while workers are killed and limits edited.

A short flood is part of `make test`. `make soak` runs one of ten minutes; `MILLPOND_FLOOD_S` names another length.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.conftest import make_folder
from tests.engine.conftest import Pond
from tests.engine.conftest import pond as pond
from tests.soak.flood import MODEL, Flood, Report

SHORT_S = 24.0
LENGTH_S = float(os.environ.get("MILLPOND_FLOOD_S", "600"))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for the workers of one test."""
    made = make_folder()
    yield made
    shutil.rmtree(made, ignore_errors=True)


def check(report: Report) -> None:
    """Hold what was counted against the limits: never more, at no moment and in no window, on any machine."""
    told = "\n".join(report.lines())
    assert {key: most for key, most in report.over.items() if most > 0} == {}, told
    assert report.outcomes["failed"] == 0, told
    assert report.outcomes["succeeded"] >= 10, told
    assert all(report.calls.values()), told


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_provider_never_sees_more_than_the_limits_allow_in_a_short_flood(
    pond: Pond, folder: Path
) -> None:
    report = await Flood(pond, folder).run(SHORT_S)
    check(report)
    assert report.toll.keys() >= {"kills", "stops", "edits"}


@pytest.mark.soak
@pytest.mark.timeout(7200)
async def test_a_provider_never_sees_more_and_nearly_all_of_what_the_limits_allow(
    pond: Pond, folder: Path
) -> None:
    report = await Flood(pond, folder).run(LENGTH_S)
    print("\n" + "\n".join(report.lines()))
    check(report)
    assert report.outcomes["succeeded"] > 5 * report.length_s
    assert report.toll["kills"] >= LENGTH_S / 20
    assert report.toll["stops"] >= LENGTH_S / 20
    # Of the whole time: what kills, stops and takeovers cost is not left out.
    assert report.used[MODEL] >= 0.95
