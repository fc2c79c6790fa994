"""The Python SDK: talks to a Millpond server over HTTP, in sync and async, and imports nothing of it.

```python
from millpond.client import Client

with Client("http://127.0.0.1:8080", token=token) as pond:
    run = pond.runs.start("support.answer", {"text": "Who pays for the return label?"})
    for event in run.events():
        print(event.kind)
    print(run.result())
```

`AsyncClient` has the same calls to await; docs/client.md tells of all of them.
"""

from millpond.client.asynchronous import AsyncClient
from millpond.client.call import UNSET, Id
from millpond.client.calls.events import EventWish
from millpond.client.calls.runs import RunWish
from millpond.client.errors import (
    ApiError,
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
    OverQuota,
    RunCancelled,
    RunFailed,
    Unauthenticated,
    Unavailable,
    WaitTimeout,
)
from millpond.client.handles import AsyncRun, Run
from millpond.client.models import (
    BulkPreview,
    Delta,
    Event,
    InputRequest,
    OrgEvent,
    Page,
    RunBatch,
    RunData,
    Signal,
    Step,
)
from millpond.client.models_calendar import (
    InboundEvent,
    InboundEvents,
    Schedule,
    StartedRun,
    Trigger,
    Waiting,
)
from millpond.client.models_control import Flow, Pause, Queue, Resumed, Why, WhyReason, Worker
from millpond.client.models_knowledge import Document, KnowledgeBase, Passage, SearchResult
from millpond.client.models_people import Me, MySession, SignedIn, User
from millpond.client.renewing import OnRenewed
from millpond.client.sending import Patience
from millpond.client.synchronous import Client

__all__ = [
    "UNSET",
    "ApiError",
    "AsyncClient",
    "AsyncRun",
    "BulkPreview",
    "Client",
    "Conflict",
    "Delta",
    "Document",
    "Event",
    "EventWish",
    "Flow",
    "Forbidden",
    "Id",
    "InboundEvent",
    "InboundEvents",
    "InputRequest",
    "InvalidRequest",
    "KnowledgeBase",
    "Me",
    "MySession",
    "NotFound",
    "OnRenewed",
    "OrgEvent",
    "OverQuota",
    "Page",
    "Passage",
    "Patience",
    "Pause",
    "Queue",
    "Resumed",
    "Run",
    "RunBatch",
    "RunCancelled",
    "RunData",
    "RunFailed",
    "RunWish",
    "Schedule",
    "SearchResult",
    "Signal",
    "SignedIn",
    "StartedRun",
    "Step",
    "Trigger",
    "Unauthenticated",
    "Unavailable",
    "User",
    "WaitTimeout",
    "Waiting",
    "Why",
    "WhyReason",
    "Worker",
]
