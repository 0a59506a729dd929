"""When schedules are due: against another implementation of cron, and across changes of the clock."""

from __future__ import annotations

import random
from datetime import datetime, timedelta, timezone
from itertools import islice
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim

from pqueue_cron import MONTHS, WEEKDAYS, Cron, Every, due_times

EXPRESSIONS = 2000


def times(expression, zone, start, number):
    """Return the next times, local, as short as they are unambiguous."""
    cron, found = Cron(expression, zone), []
    at = datetime.fromisoformat(start).replace(tzinfo=ZoneInfo(zone)).timestamp()
    for _ in range(number):
        at = cron.next(at)
        found.append(datetime.fromtimestamp(at, ZoneInfo(zone)).strftime("%d %H:%M:%S %z").replace(":00 ", " "))
    return found


def random_field(least, most, names=()):
    def number(value):
        return names[value - least] if value - least < len(names) and random.random() < 0.4 else str(value)

    def part():
        first = random.randint(least, most - 1)
        last = random.randint(first + 1, most)
        step = random.choice(["", "", f"/{random.randint(1, 5)}"])
        return random.choice([number(first), f"{number(first)}-{number(last)}{step}"])

    every = random.choice(["*", "*", f"*/{random.randint(1, max(1, (most - least) // 2))}"])
    return random.choice([every, ",".join(part() for _ in range(random.randint(1, 3)))])


def test_expression_matches_the_times_that_another_implementation_finds():
    random.seed(1)
    for _ in range(EXPRESSIONS):
        fields = [(0, 59), (0, 23), (1, 31), (1, 12, MONTHS), (0, 6, WEEKDAYS)]
        expression = " ".join(random_field(*field) for field in fields)
        at = random.uniform(1.5e9, 1.9e9)
        oracle = islice(CronSim(expression, datetime.fromtimestamp(at, timezone.utc)), 4)
        cron = Cron(expression)
        for expected in oracle:
            at = cron.next(at)
            assert at == expected.timestamp(), expression


@pytest.mark.parametrize(
    ("expression", "zone", "start", "expected"),
    [
        # Clocks go from 02:00 to 03:00 on 29 March, and from 03:00 to 02:00 on 25 October.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28", ["28 02:30 +0100", "29 03:00 +0200", "30 02:30 +0200"]),
        ("14 2 * * *", "Europe/Berlin", "2026-03-29", ["29 03:00 +0200", "30 02:14 +0200"]),
        ("*/15 2 * * *", "Europe/Berlin", "2026-03-29", ["29 03:00 +0200", "30 02:00 +0200", "30 02:15 +0200"]),
        ("0,30 2,3 * * *", "Europe/Berlin", "2026-03-29", ["29 03:00 +0200", "29 03:30 +0200", "30 02:00 +0200"]),
        ("30 * * * *", "Europe/Berlin", "2026-03-29", ["29 00:30 +0100", "29 01:30 +0100", "29 03:30 +0200"]),
        ("0 */2 * * *", "Europe/Berlin", "2026-03-29", ["29 03:00 +0200", "29 04:00 +0200", "29 06:00 +0200"]),
        ("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00", ["25 02:30 +0200", "26 02:30 +0100"]),
        ("30 * * * *", "Europe/Berlin", "2026-10-25T02:00", ["25 02:30 +0200", "25 02:30 +0100", "25 03:30 +0100"]),
        ("*/30 2 * * *", "Europe/Berlin", "2026-10-25", ["25 02:00 +0200", "25 02:30 +0200", "26 02:00 +0100"]),
        # At midnight, by half an hour, and by a whole day
        ("0 0 * * *", "America/Havana", "2024-03-09T12:00", ["10 01:00 -0400", "11 00:00 -0400"]),
        ("15 0 * * *", "America/Havana", "2024-11-02T12:00", ["03 00:15 -0400", "04 00:15 -0500"]),
        ("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T12:00", ["04 02:30 +1100", "05 02:15 +1100"]),
        ("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T12:00", ["05 01:45 +1100", "06 01:45 +1030"]),
        ("0 12 * * *", "Pacific/Apia", "2011-12-29", ["29 12:00 -1000", "31 00:00 +1400", "31 12:00 +1400"]),
        # Without any change
        ("0 9 * * mon-fri", "Asia/Tokyo", "2026-11-27T10:00", ["30 09:00 +0900", "01 09:00 +0900"]),
        ("0 0 * * sat-sun", "UTC", "2026-11-26", ["28 00:00 +0000", "29 00:00 +0000", "05 00:00 +0000"]),
        ("0 0 13 * fri", "UTC", "2026-11-01", ["06 00:00 +0000", "13 00:00 +0000", "20 00:00 +0000"]),
        ("@weekly", "UTC", "2026-11-26", ["29 00:00 +0000", "06 00:00 +0000"]),
        ("0 0 29 2 *", "UTC", "2026-11-26", ["29 00:00 +0000", "29 00:00 +0000"]),
    ],
)  # fmt: skip
def test_local_time_is_due_once_whatever_the_clock_does(expression, zone, start, expected):
    assert times(expression, zone, start, len(expected)) == expected


def test_every_minute_is_due_each_minute_across_all_changes_of_a_year():
    cron = Cron("* * * * *", "Europe/Berlin")
    for change in (datetime(2026, 3, 29, tzinfo=timezone.utc), datetime(2026, 10, 25, tzinfo=timezone.utc)):
        at = change.timestamp()
        for _ in range(240):
            assert cron.next(at) == at + 60
            at += 60


@pytest.mark.parametrize("expression", ["* * * * *", "*/7 * * * *", "30 2 * * *", "0 0 1 * *", "0 0 29 2 *"])
def test_latest_time_is_the_last_that_next_returns(expression):
    cron = Cron(expression, "America/New_York")
    since = cron.next(datetime(2020, 1, 1, tzinfo=timezone.utc).timestamp())
    for days in (0, 0.3, 1.5, 40, 400, 3000):
        until = since + timedelta(days=days).total_seconds()
        latest = cron.latest(since, until)
        assert since <= latest <= until < cron.next(latest)


def test_interval_keeps_to_its_first_time():
    assert Every(10).latest(5, 38) == 35
    assert due_times(Every(10), 5, "all", 38, limit=3) == ([5, 15, 25], 35)
    assert due_times(Every(10), 5, "once", 38, limit=3) == ([35], 45)
    assert due_times(Every(100), 5, "skip", 104, limit=3) == ([], 105)
    assert due_times(Every(100), 5, "skip", 64, limit=3) == ([5], 105)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        *((text, "five fields") for text in ("", "* * * *", "* * * * * *", "@never", None, 5)),
        *((f"{text} * * * *", "a minute from 0 to 59") for text in ("60", "-1", "5-1", "1/5", "*/0", "a", "1,", "*-5")),
        *((f"{text} * * * *", "a minute from 0 to 59") for text in ("\u0661", "5-*", "1-5-9", "1//2", "/2", "")[:5]),
        ("* 24 * * *", "an? hour from 0 to 23"),
        ("* * 0 * *", "a day from 1 to 31"),
        ("* * * foo *", "a month from 1 to 12"),
        ("* * * * 8", "a weekday from 0 to 7"),
        ("0 0 31 2,4 *", "matches some day"),
    ],
)  # fmt: skip
def test_expression_that_is_not_valid_is_refused(expression, reason):
    with pytest.raises(ValueError, match=reason):
        Cron(expression)


@pytest.mark.parametrize("zone", ["Europe/Atlantis", "", "../etc/passwd", None, 1, ZoneInfo("UTC")])
def test_zone_that_does_not_exist_is_refused(zone):
    with pytest.raises(ValueError, match="expected the name of a time zone"):
        Cron("@daily", zone)
