"""Cancelling over HTTP, behind the pooler: the tests that there are without one."""

from tests.api.test_cancel import *  # noqa: F403
