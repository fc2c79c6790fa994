"""The road of a run behind the pooler, by the tests that it has without one."""

from tests.engine.test_road import *  # noqa: F403
