"""Rescue, and sessions that are gone, behind the pooler: the tests that there are without one."""

from tests.engine.test_rescue import *  # noqa: F403
