"""The claim's lock, behind the pooler: the tests that there are without one."""

from tests.engine.test_claim_lock import *  # noqa: F403
