"""Repeated requests over HTTP, behind the pooler: the tests that there are without one."""

from tests.api.test_idempotency import *  # noqa: F403
