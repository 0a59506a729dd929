"""When a schedule is due: cron expressions in a time zone, and intervals."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from itertools import product
from typing import Any

from pqueue_values import MAX_GROUP_CHARS, above_0, short, valid_name

NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
FIELDS = {  # name: least, most, and the names of values
    "minute": (0, 59, ()),
    "hour": (0, 23, ()),
    "day": (1, 31, ()),
    "month": (1, 12, MONTHS),
    "weekday": (0, 7, WEEKDAYS),
}
ON_MISSED = ("once", "skip", "all")
MISSED_SECONDS = 60.0  # after which a time counts as missed
LONGEST_FOLD = timedelta(hours=24)  # by which clocks are set back
LONGEST_CYCLE = timedelta(days=40 * 366)  # of 29 February on a certain weekday, across a year like 2100
LEAST_SECONDS = 0.001  # of an interval: a float of Unix seconds can be advanced by as much
EARLIEST, LATEST = -6.2e10, 2.5e11  # Unix seconds, within the years that Python's dates have


class Cron:
    """A cron expression of five fields: minute, hour, day of the month, month and weekday (0 or 7: Sunday).

    A field is `*`, a number, a range `1-5`, each with a step such as `*/15`, or a list of these, separated by commas.
    Months and weekdays may be names of three letters. If both days are restricted (neither begins with `*`), either
    matches, as in crontab(5). `@hourly`, `@daily`, `@weekly`, `@monthly` and `@yearly` are abbreviations.

    A local time that is skipped when clocks are set forward is due at the end of the gap, once. One that is repeated
    when they are set back is due the first time only. With `*` as the hour, the schedule continues by elapsed time.

    Raises ValueError for an invalid expression, or one that never matches.
    """

    def __init__(self, expression: str, zone: str = "UTC") -> None:
        self.expression, self.zone = expression, time_zone(zone)
        text = expression.lower() if isinstance(expression, str) else ""
        fields = NICKNAMES.get(text, text).split()
        if len(fields) != len(FIELDS):
            raise ValueError(
                f"expected a cron expression of five fields, such as '30 2 * * mon-fri', got {short(expression)}"
            )
        minutes, hours, self._days, self._months, weekdays = (
            _numbers(name, field, expression) for name, field in zip(FIELDS, fields, strict=True)
        )
        self._times = sorted(product(hours, minutes))
        self._weekdays = {number % 7 for number in weekdays}
        self._either_day = not (fields[2].startswith("*") or fields[4].startswith("*"))
        self._every_hour = fields[1] in ("*", "*/1")
        self.next(0.0)

    def next(self, after: float) -> float:
        """Return the first time after this one when it is due; both in Unix seconds. Raises ValueError."""
        if not EARLIEST <= after <= LATEST:
            raise ValueError(f"expected a time of the years 6 to 9891, in Unix seconds, got {after:g}")
        now = datetime.fromtimestamp(after, self.zone)
        repeated = self._offset(after) - self._offset(after + LONGEST_FOLD.total_seconds())
        found = None
        for wall in self._walls(now.replace(tzinfo=None) - max(repeated, timedelta(0))):
            instants = self._instants(wall)
            if found is not None and (not instants or instants[0] >= found):
                return found
            found = min((each for each in instants if each > after and (found is None or each < found)), default=found)
        raise ValueError(f"expected a cron expression that matches some day, got {short(self.expression)}")

    def latest(self, since: float, until: float) -> float:
        """Return the last time when it is due, until this one. since: one such time."""
        seconds, found = 120.0, since
        while found == since and seconds < 60 * (until - since):
            following = self.next(max(since, until - seconds))
            while following <= until:
                found, following = following, self.next(following)
            seconds *= 60
        return found

    def _walls(self, start: datetime) -> Iterator[datetime]:
        """Yield the local times that match, from `start` on."""
        day = start.date()
        while day - start.date() < LONGEST_CYCLE:
            if self._matches(day):
                for hour, minute in self._times:
                    if (wall := datetime(day.year, day.month, day.day, hour, minute)) >= start:
                        yield wall
            day += timedelta(days=1)

    def _matches(self, day: date) -> bool:
        if day.month not in self._months:
            return False
        is_day, is_weekday = day.day in self._days, day.isoweekday() % 7 in self._weekdays
        return is_day or is_weekday if self._either_day else is_day and is_weekday

    def _instants(self, wall: datetime) -> list[float]:
        """Return when a local time is due: usually once."""
        first, second = (wall.replace(tzinfo=self.zone, fold=fold).timestamp() for fold in (0, 1))
        if first > second:  # clocks are set forward: it does not exist
            return [] if self._every_hour else [self._end_of_gap(second, first)]
        return [first, second] if first < second and self._every_hour else [first]

    def _end_of_gap(self, before: float, after: float) -> float:
        seconds = range(int(after - before))
        return before + bisect_left(seconds, self._offset(after), key=lambda second: self._offset(before + second))

    def _offset(self, at: float) -> timedelta:
        return datetime.fromtimestamp(at, self.zone).utcoffset() or timedelta(0)


class Every:
    """An interval."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def next(self, after: float) -> float:
        """Return the time one interval later."""
        return after + self.seconds

    def latest(self, since: float, until: float) -> float:
        """Return the last time, until this one, that is a number of intervals after `since`."""
        return since + (until - since) // self.seconds * self.seconds


@lru_cache(maxsize=1024)
def timing(cron: str | None, zone: str, every_seconds: float | None) -> Cron | Every:
    return Every(every_seconds or math.inf) if cron is None else Cron(cron, zone)


def valid_times(
    cron: str | None,
    zone: str,
    every_seconds: float | timedelta | None,
    on_missed: str,
    overlap: bool,
    group: str | None,
) -> dict[str, Any]:
    """Return these options of a schedule as they are stored. Raises ValueError."""
    if (cron is None) == (every_seconds is None):
        raise ValueError(f"expected either cron or every_seconds, got {'neither' if cron is None else 'both'}")
    if on_missed not in ON_MISSED:
        raise ValueError(f"expected on_missed to be one of {', '.join(ON_MISSED)}, got {short(on_missed)}")
    if not isinstance(overlap, bool):
        raise ValueError(f"expected overlap to be True or False, got {short(overlap)}")
    seconds = None if every_seconds is None else above_0("every_seconds", every_seconds)
    # guard: an interval advances the time
    if seconds is not None and seconds < LEAST_SECONDS:
        raise ValueError(f"expected every_seconds of at least {LEAST_SECONDS}, got {short(every_seconds)}")
    if cron is not None:
        Cron(cron, zone)
    elif zone != "UTC":
        raise ValueError(f"expected cron together with zone, got zone {short(zone)} alone")
    of_group = None if group is None else valid_name("group", group, MAX_GROUP_CHARS)
    given = {"cron": cron, "zone": zone, "every_seconds": seconds, "group": of_group}
    return {**given, "on_missed": on_missed, "overlap": int(overlap)}


def due_times(timing: Cron | Every, at: float, on_missed: str, now: float, limit: int) -> tuple[list[float], float]:
    """Return the times for which a schedule that was due `at` gets jobs now, and when it is due next."""
    if on_missed == "all":
        times: list[float] = []
        while at <= now and len(times) < limit:
            times.append(at)
            at = timing.next(at)
        return times, at
    latest = timing.latest(at, now)
    is_missed = on_missed == "skip" and now - latest >= MISSED_SECONDS
    return [] if is_missed else [latest], timing.next(latest)


def time_zone(name: str) -> tzinfo:
    if name == "UTC":  # also where no time zones are installed
        return timezone.utc
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name if isinstance(name, str) else "")
    except (LookupError, ValueError, OSError, TypeError):
        raise ValueError(f"expected the name of a time zone, such as 'Europe/Berlin', got {short(name)}") from None


def _numbers(name: str, field: str, expression: str) -> set[int]:
    """Return the numbers that a field matches."""
    try:
        return {number for part in field.split(",") for number in _range(name, part)}
    except ValueError:
        least, most, _ = FIELDS[name]
        raise ValueError(
            f"expected a {name} from {least} to {most}, *, a range, a step or a list, "
            f"got {field!r} in {short(expression)}"
        ) from None


def _range(name: str, part: str) -> range:
    least, most, _ = FIELDS[name]
    bounds, has_step, step = part.partition("/")
    first, is_range, last = bounds.partition("-")
    if bounds == "*":
        start, stop = least, most
    else:
        start = _number(name, first)
        stop = _number(name, last) if is_range else start
        if name == "weekday" and is_range and stop == 0:  # fri-sun
            stop = 7
    if start > stop or (has_step and not (is_range or bounds == "*")):
        raise ValueError
    return range(start, stop + 1, _digits(step, 1, most) if has_step else 1)


def _number(name: str, text: str) -> int:
    least, most, names = FIELDS[name]
    return least + names.index(text) if text in names else _digits(text, least, most)


def _digits(text: str, least: int, most: int) -> int:
    if text.isascii() and text.isdigit() and least <= int(text) <= most:
        return int(text)
    raise ValueError
