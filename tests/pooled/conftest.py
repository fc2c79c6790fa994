"""The databases of these tests are reached through PgBouncer in transaction mode, but for LISTEN.

Most of them are the suite's own, once more: a module here takes over those of a module elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests import pooler
from tests.engine.conftest import pond as pond
from tests.pooler import PooledUrls, Pooler

from millpond.db.embedded import EmbeddedPostgres, Urls

# Fewer than the connections of one worker's pool, so that they are passed on all the time.
SIZE = 4


@pytest.fixture(scope="session")
def before(server: EmbeddedPostgres) -> Iterator[Pooler]:
    """The pooler of this test process, before every database of its server."""
    pooler.need_statements_carried()
    with pooler.place() as place:
        made = Pooler.before(server.urls("postgres"), place, size=SIZE)
        made.start()
        yield made
        made.stop()


@pytest.fixture
def urls(urls: Urls, before: Pooler) -> PooledUrls:
    """Addresses of a fresh database through the pooler."""
    return before.urls(urls)
