"""People's answers over HTTP, behind the pooler: the tests that there are without one."""

from tests.api.test_inputs import *  # noqa: F403
