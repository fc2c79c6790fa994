"""Signals and the runs that wait for them, behind the pooler: the tests that there are without one."""

from tests.engine.test_signals import *  # noqa: F403
