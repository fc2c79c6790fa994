"""The road of a run, behind the pooler: the tests that there are without one."""

from tests.engine.test_road import *  # noqa: F403
