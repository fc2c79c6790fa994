"""The API of these tests has its database behind the pooler."""

from tests.api.conftest import ann as ann
from tests.api.conftest import embedder as embedder
from tests.api.conftest import front as front
