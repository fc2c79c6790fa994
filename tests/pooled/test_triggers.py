"""Events that start runs, behind the pooler: the tests that there are without one."""

from tests.engine.test_triggers import *  # noqa: F403
