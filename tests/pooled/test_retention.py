"""Retention, behind the pooler: the tests that there are without one."""

from tests.engine.test_retention import *  # noqa: F403
