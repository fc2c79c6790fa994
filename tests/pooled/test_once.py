"""Steps that must not be repeated, and who is asked, behind the pooler: the tests that there are without one."""

from tests.engine.test_once import *  # noqa: F403
