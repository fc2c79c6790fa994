"""Calendar: when a cron expression in a time zone is due, and what to make of times that were missed.

Called by `schedules` (to check and to show) and by `firing`. Pure: the caller says what time it is.
Invariant: due times are whole minutes in UTC, and each comes once, also where clocks are changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError, available_timezones

from cronsim import CronSim, CronSimError

from millpond.errors import InvalidInput

Missed = Literal["skip", "one", "all"]

MAX_MISSED = 100
# Older than this, a due time counts as missed; younger, the chores were merely busy.
LATE_S = 60.0
_MAX_LENGTH = 200
_MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
_EXPECTED = {
    "minute": "minute (first field): 0-59",
    "hour": "hour (second field): 0-23",
    "day-of-month": "day of the month (third field): 1-31 that the month has, L for the last, "
    "LW for the last working day",
    "month": "month (fourth field): 1-12 or JAN-DEC",
    "day-of-week": "day of the week (fifth field): 0-7 or SUN-SAT, MON#2 for the second, "
    "5L for the last Friday of the month",
}
# Searching backwards is only a guess where clocks are changed; from so much earlier it is forwards.
_GUESS = timedelta(hours=3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calendar:
    """A cron expression in an IANA time zone; made by `calendar`, which checks both.

    As in Debian's cron, a fixed time that clocks skip is due right after the gap, and one that comes
    twice is due the first time; expressions whose minute or hour begins with `*` follow the real hours.
    """

    cron: str
    zone: tzinfo

    def after(self, at: datetime) -> Iterator[datetime]:
        """Yield the due times after `at`, in UTC; ends where none follows within 50 years."""
        last = at.astimezone(UTC)
        for due in CronSim(self.cron, at.astimezone(self.zone)):
            # In the hour that comes twice, the library counts by wall clock and may look back.
            if (found := due.astimezone(UTC)) > last:
                last = found
                yield found

    def next_after(self, at: datetime) -> datetime | None:
        """Return the first due time after `at`, None where none follows."""
        return next(self.after(at), None)

    def latest(self, first: datetime, until: datetime, count: int) -> list[datetime]:
        """Return the last `count` due times from `first` to `until`, both included, in order."""
        begin = max(first, self._before(until, count)) - timedelta(seconds=1)
        found: deque[datetime] = deque(maxlen=count)
        for due in self.after(begin):
            if due > until:
                break
            found.append(due)
        return list(found)

    def _before(self, until: datetime, count: int) -> datetime:
        """Return a time before the last `count` due times, near them: walks backwards to it.

        One more than asked for, since within the second of `until` the library looks ahead.
        """
        at = until
        walk = CronSim(
            self.cron, (until + timedelta(seconds=1)).astimezone(self.zone), reverse=True
        )
        for _, due in zip(range(count + 1), walk, strict=False):
            at = due.astimezone(UTC)
        return at - _GUESS


def calendar(cron: str, time_zone: str) -> Calendar:
    """Return the calendar of an expression; raises InvalidInput naming `cron` or `time_zone`."""
    expression = _MACROS.get(cron.strip().lower(), cron)
    zone = _zone(time_zone)
    _check(expression)
    return Calendar(cron=expression, zone=zone)


def missed_times(of: Calendar, policy: Missed, due_at: datetime, now: datetime) -> list[datetime]:
    """Return the due times that shall have a run now, of those from `due_at` to `now`, in order.

    `skip` gives those that are not older than LATE_S, `one` the last, `all` the last MAX_MISSED.
    """
    match policy:
        case "skip":
            return of.latest(max(due_at, now - timedelta(seconds=LATE_S)), now, MAX_MISSED)
        case "one":
            return of.latest(due_at, now, 1)
        case "all":
            return of.latest(due_at, now, MAX_MISSED)


@lru_cache(maxsize=1)
def _zone_names() -> frozenset[str]:
    return frozenset(available_timezones()) - {"localtime"}


@lru_cache(maxsize=1024)
def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC
    if name in _zone_names():
        try:
            return ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            pass
    raise InvalidInput(
        "time_zone is a name of the IANA time zone database, such as Europe/Berlin or UTC",
        param="time_zone",
        code="time_zone_unknown",
    )


def _check(cron: str) -> None:
    if len(cron) > _MAX_LENGTH or len(cron.split()) != 5:
        raise _refusal(
            "five fields are expected: minute, hour, day of the month, month, day of the week"
        )
    try:
        found = next(CronSim(cron, datetime(2000, 1, 1, tzinfo=UTC)), None)
    except CronSimError as error:
        field = str(error).removeprefix("Bad ")
        raise _refusal(f"not valid at {_EXPECTED.get(field, field)}") from error
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        # The library lets some malformed fields through to its arithmetic.
        raise _refusal("a field cannot be read") from error
    if found is None:
        raise _refusal("no date of the next 50 years matches")


def _refusal(reason: str) -> InvalidInput:
    return InvalidInput(
        f"the cron expression is not valid: {reason}",
        param="cron",
        code="cron_invalid",
        advice="for example `0 9 * * MON-FRI`: at nine on working days",
    )
