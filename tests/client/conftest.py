"""The SDK's clients beside a real server: the fixtures of the API's tests, and a caller."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.api.conftest import Front, embedder, front

from millpond.client import AsyncClient, Patience

__all__ = ["embedder", "front"]

QUICK = Patience(max_tries=4, base_s=0.01, cap_s=0.02)


@pytest.fixture
async def pond(front: Front) -> AsyncIterator[AsyncClient]:
    """The async client of a caller with all permissions."""
    async with AsyncClient(front.url, token=front.token(), patience=QUICK) as client:
        yield client


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the repository's folder."""
    return Path(__file__).parents[2]
