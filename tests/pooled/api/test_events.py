"""Streams of events over HTTP, behind the pooler: the tests that there are without one."""

from tests.api.test_events import *  # noqa: F403
