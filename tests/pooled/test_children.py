"""Child runs, behind the pooler: the tests that there are without one."""

from tests.engine.test_children import *  # noqa: F403
