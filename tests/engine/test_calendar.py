"""Due times of cron expressions: clock changes, rare dates, missed times, refusals."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millpond.engine.calendar import calendar, missed_times
from millpond.errors import InvalidInput


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def due(cron: str, zone: str, after: str, count: int) -> list[str]:
    found = islice(calendar(cron, zone).after(at(after)), count)
    return [one.strftime("%Y-%m-%d %H:%M") for one in found]


def test_a_time_that_the_clocks_skip_is_due_right_after_the_gap():
    # Berlin, 29 March 2026: 01:59 +1 is followed by 03:00 +2, which is 01:00 UTC.
    assert due("30 2 * * *", "Europe/Berlin", "2026-03-27 12:00", 3) == [
        "2026-03-28 01:30",
        "2026-03-29 01:00",
        "2026-03-30 00:30",
    ]


def test_two_times_that_fall_together_after_the_gap_are_due_once():
    assert due("0 2,3 * * *", "Europe/Berlin", "2026-03-29 00:00", 2) == [
        "2026-03-29 01:00",
        "2026-03-30 00:00",
    ]


def test_a_time_that_comes_twice_is_due_the_first_time_only():
    # Berlin, 25 October 2026: 02:30 comes at 00:30 and at 01:30 UTC.
    assert due("30 2 * * *", "Europe/Berlin", "2026-10-24 12:00", 2) == [
        "2026-10-25 00:30",
        "2026-10-26 01:30",
    ]
    # Asked in the second of the two hours, the answer is not in the first.
    assert due("30 2 * * *", "Europe/Berlin", "2026-10-25 01:10", 1) == ["2026-10-26 01:30"]


def test_every_quarter_of_an_hour_goes_on_through_clock_changes():
    for start in ("2026-03-29 00:00", "2026-10-25 00:00"):
        found = list(islice(calendar("*/15 * * * *", "Europe/Berlin").after(at(start)), 16))
        assert {b - a for a, b in pairwise(found)} == {timedelta(minutes=15)}


def test_a_zone_whose_midnight_is_skipped_is_due_once_that_day():
    # Cairo, 24 April 2026: midnight is followed by one o'clock.
    assert due("0 0 * * *", "Africa/Cairo", "2026-04-22 23:00", 2) == [
        "2026-04-23 22:00",
        "2026-04-24 21:00",
    ]


def test_the_29th_of_february_is_due_in_leap_years_only():
    assert due("0 0 29 2 *", "UTC", "2026-01-01 00:00", 2) == [
        "2028-02-29 00:00",
        "2032-02-29 00:00",
    ]
    assert due("0 0 29 2 *", "UTC", "2096-03-01 00:00", 1) == ["2104-02-29 00:00"]


def test_last_days_and_nth_weekdays_are_known():
    assert due("0 0 L * *", "UTC", "2028-02-01 00:00", 2) == [
        "2028-02-29 00:00",
        "2028-03-31 00:00",
    ]
    assert due("0 9 * * 5L", "UTC", "2026-11-01 00:00", 1) == ["2026-11-27 09:00"]
    assert due("0 9 * * MON#2", "UTC", "2026-11-01 00:00", 1) == ["2026-11-09 09:00"]
    assert due("0 9 LW * *", "UTC", "2026-05-01 00:00", 1) == ["2026-05-29 09:00"]


def test_short_names_stand_for_expressions():
    assert due("@daily", "UTC", "2026-11-01 05:00", 1) == ["2026-11-02 00:00"]
    assert due("@Hourly", "UTC", "2026-11-01 05:10", 1) == ["2026-11-01 06:00"]


@pytest.mark.parametrize(
    ("cron", "named"),
    [
        ("61 * * * *", "minute"),
        ("* 24 * * *", "hour"),
        ("0 0 0 * *", "day of the month"),
        ("0 0 30 2 *", "day of the month"),
        ("0 0 * 13 *", "month"),
        ("0 0 * * 8", "day of the week"),
        ("0 0 * * MON#6", "day of the week"),
        ("* * * *", "five fields"),
        ("* * * * * *", "five fields"),
        ("@reboot", "five fields"),
        ("", "five fields"),
        ("*/0 * * * *", "minute"),
        ("5-1 * * * *", "minute"),
        ("0 0 * * MON#1/2", "field"),
        ("0 0 * * 1" + "1" * 300, "five fields"),
        ("0 0 ٣ * *", "day of the month"),
    ],
)
def test_an_invalid_expression_is_refused_with_what_is_expected(cron: str, named: str):
    with pytest.raises(InvalidInput) as caught:
        calendar(cron, "UTC")
    assert (caught.value.param, caught.value.code) == ("cron", "cron_invalid")
    assert named in caught.value.message


@pytest.mark.parametrize("zone", ["Mars/Base", "", "../etc/passwd", "localtime", "Europe"])
def test_an_unknown_zone_is_refused(zone: str):
    with pytest.raises(InvalidInput) as caught:
        calendar("* * * * *", zone)
    assert caught.value.param == "time_zone"


def test_missed_times_follow_the_policy():
    hourly = calendar("0 * * * *", "UTC")
    first, now = at("2026-11-01 00:00"), at("2026-11-01 05:00") + timedelta(seconds=30)
    assert missed_times(hourly, "skip", first, now) == [at("2026-11-01 05:00")]
    assert missed_times(hourly, "one", first, now) == [at("2026-11-01 05:00")]
    assert missed_times(hourly, "all", first, now) == [
        at(f"2026-11-01 0{hour}:00") for hour in range(6)
    ]
    later = at("2026-11-01 05:30")
    assert missed_times(hourly, "skip", first, later) == []
    assert missed_times(hourly, "one", first, later) == [at("2026-11-01 05:00")]


def test_of_many_missed_times_the_last_hundred_count():
    every = calendar("* * * * *", "Europe/Berlin")
    found = missed_times(every, "all", at("2020-01-01 00:00"), at("2026-11-01 00:00"))
    assert (len(found), found[0], found[-1]) == (
        100,
        at("2026-10-31 22:21"),
        at("2026-11-01 00:00"),
    )


def test_the_second_before_a_due_time_has_the_one_before_as_its_latest():
    daily = calendar("0 13 * * *", "UTC")
    until = at("2026-11-25 12:59:59") + timedelta(milliseconds=500)
    assert daily.latest(at("2026-11-01 00:00"), until, 1) == [at("2026-11-24 13:00")]


CRONS = ["*/7 * * * *", "30 2 * * *", "0 2,3 * * *", "15 */6 * * *", "0 0 L * *", "5 1 * * SUN#2"]
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Sydney"]


@settings(max_examples=60, deadline=None)
@given(
    cron=st.sampled_from(CRONS),
    zone=st.sampled_from(ZONES),
    start=st.integers(1_704_067_200, 1_893_456_000),  # from 2024 to 2030
    millis=st.integers(0, 400 * 3_600_000),
    count=st.integers(1, 5),
)
def test_due_times_ascend_and_the_latest_are_the_last_of_them(cron, zone, start, millis, count):
    found_in = calendar(cron, zone)
    first = datetime.fromtimestamp(start, UTC)
    until = first + timedelta(milliseconds=millis)
    forwards = []
    for one in found_in.after(first - timedelta(microseconds=1)):
        if one > until:
            break
        forwards.append(one)
    assert forwards == sorted(set(forwards))
    assert [found_in.next_after(one) for one in forwards[:-1]] == forwards[1:]
    assert found_in.latest(first, until, count) == forwards[-count:]
