"""Starting runs over HTTP, behind the pooler: the tests that there are without one."""

from tests.api.test_start import *  # noqa: F403
