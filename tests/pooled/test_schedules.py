"""Schedules, behind the pooler: the tests that there are without one."""

from tests.engine.test_schedules import *  # noqa: F403
