"""The Python SDK: talks to a Millpond server over HTTP, in sync and async, and imports nothing of it.

```python
from millpond.client import Client

with Client("http://127.0.0.1:8080", token=token) as pond:
    run = pond.runs.start("support.answer", {"text": "Who pays for the return label?"})
    for event in run.events():
        print(event.kind)
    print(run.result())
```

`AsyncClient` has the same calls to await.
"""

from millpond.client.asynchronous import AsyncClient, AsyncRun
from millpond.client.errors import (
    ApiError,
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    RunCancelled,
    RunFailed,
    Unauthenticated,
    Unavailable,
    WaitTimeout,
)
from millpond.client.models import Event, InputRequest, RunData, Step
from millpond.client.synchronous import Client, Run

__all__ = [
    "ApiError",
    "AsyncClient",
    "AsyncRun",
    "Client",
    "Conflict",
    "Event",
    "Forbidden",
    "InputRequest",
    "InvalidRequest",
    "NotFound",
    "Run",
    "RunCancelled",
    "RunData",
    "RunFailed",
    "Step",
    "Unauthenticated",
    "Unavailable",
    "WaitTimeout",
]
