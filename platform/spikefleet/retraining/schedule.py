"""The local schedule: a loop in the foreground that runs a job at the times of a cron expression.

Times are those of the wall clock in a time zone. A time that the clock leaves out in spring comes when it has gone
forward, and one that it shows twice in autumn comes once, as in Debian's cron. A time that passed while a job ran, the
machine slept or the clock was set forward is skipped with a line, never replayed.
"""

from __future__ import annotations

import re
import time
import traceback
import zoneinfo
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from difflib import get_close_matches

from cronsim import CronSim, CronSimError
from rich.console import Console

from spikefleet.errors import RunError, UserError
from spikefleet.status import print_line, print_whole
from spikefleet_pipelines.errors import SourceError, StoreError
from spikefleet_tune.interruption import handling, raise_interrupted
from spikefleet_tune.messages import counted

Clock = Callable[[], datetime]
"""Returns the present time, with a time zone."""

PIECE_S = 30.0
"""Longest sleep: a machine that wakes up, or a clock that is set, is noticed after as much."""

LATE = timedelta(seconds=60)
"""A job that would start later than this is skipped: the machine slept, or its clock was set forward."""

_CORRECTION = timedelta(days=1)
"""A clock that is set back by more was wrong before, and what ran by it does not count."""

_MOST_COUNTED = 1_000
"""Of skipped times."""

_FIELDS = ("minute", "hour", "day of the month", "month", "day of the week")
_CRONSIM_FIELDS = ("minute", "hour", "day-of-month", "month", "day-of-week")
_UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
_NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
"""Of other crons, for the remedy."""


def utc_now() -> datetime:
    """The present time of the wall clock."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Schedule:
    """The times of a cron expression in a time zone."""

    expression: str
    zone: tzinfo

    @classmethod
    def parse(cls, expression: str, timezone: str) -> Schedule:
        """A schedule from its two options.

        Args:
            expression: five fields of cron, such as `0 3 * * 1`: Mondays at 3:00.
            timezone: name in the IANA database, such as `Europe/Berlin`.

        Raises:
            UserError: the expression is none, names a time that never comes, or the time zone is unknown.
        """
        schedule = cls(expression, _zone(timezone))
        fields = expression.split()
        if len(fields) != len(_FIELDS):
            nickname = _NICKNAMES.get(expression.strip().lower())
            remedy = f"write {nickname!r}" if nickname else "write them as '0 3 * * 1', which is Mondays at 3:00"
            raise UserError(
                f"--schedule {expression!r} has {counted(len(fields), 'field')}, expected five: "
                f"{', '.join(_FIELDS)}; {remedy}"
            )
        try:
            schedule.after(utc_now())
        except CronSimError as error:
            raise UserError(f"--schedule {expression!r}: {_complaint(error, fields)}") from None
        return schedule

    def after(self, moment: datetime) -> datetime:
        """The first time after a moment, in the time zone of the schedule.

        Raises:
            UserError: there is none in 50 years.
        """
        # Compared in UTC: of two times in one zone Python compares what the clock shows, which autumn shows twice.
        # cronsim itself goes back to the first of both: its next time may be one that has passed.
        instant = moment.astimezone(UTC)
        for tick in CronSim(self.expression, moment.astimezone(self.zone)):
            if tick.astimezone(UTC) > instant:
                return tick
        raise UserError(f"--schedule {self.expression!r} names no time in the next 50 years; name a day that exists")

    def between(self, after: datetime, until: datetime) -> list[datetime]:
        """The times after one moment and not after another, up to 1,000 of them."""
        ticks: list[datetime] = []
        tick = self.after(after)
        while tick.astimezone(UTC) <= until.astimezone(UTC) and len(ticks) < _MOST_COUNTED:
            ticks.append(tick)
            tick = self.after(tick)
        return ticks


def next_time(expression: str, timezone: str, *, now: Clock = utc_now) -> datetime:
    """The next time of a schedule, in its time zone. Raises UserError as `Schedule.parse` does."""
    return Schedule.parse(expression, timezone).after(now())


def announcement(due: datetime, current: datetime, what: str = "retraining") -> str:
    """Says when the next job begins, such as `next retraining at 2026-11-30 03:00 CET (in 2 d 4 h)`."""
    return f"next {what} at {shown(due)} (in {duration(_instant(due) - _instant(current))})"


def shown(moment: datetime) -> str:
    """A time as a user reads it: `2026-11-30 03:00 CET`."""
    return moment.strftime("%Y-%m-%d %H:%M %Z").rstrip()


def duration(span: timedelta) -> str:
    """A time span by its two largest units: `2 d 4 h`, `10 min`, `25 s`."""
    rest, parts = max(0, round(span.total_seconds())), []
    for unit, seconds in _UNITS:
        number, rest = divmod(rest, seconds)
        parts.append((number, unit))
    first = next((place for place, (number, _) in enumerate(parts) if number), len(parts) - 1)
    named = [f"{number} {unit}" for number, unit in parts[first : first + 2] if number]
    return " ".join(named) or "0 s"


def run_on_schedule(
    expression: str,
    timezone: str,
    job: Callable[[datetime], None],
    console: Console,
    *,
    now: Clock = utc_now,
    sleep: Callable[[float], None] = time.sleep,
    what: str = "retraining",
) -> None:
    """Runs a job at each time of a schedule, until a signal.

    SIGINT and SIGTERM end a wait at once. While a job runs, what the job does with signals holds. A job that fails is
    reported, and the next one runs.

    Args:
        expression: five fields of cron.
        timezone: name in the IANA database.
        job: called with the time that has come.
        console: for announcements.
        now: the wall clock.
        sleep: called with at most 30 s.
        what: the job in a word.

    Raises:
        UserError: the expression or the time zone is invalid.
        Interrupted: a signal came.
    """
    schedule = Schedule.parse(expression, timezone)
    settled: datetime | None = None  # all times up to here have run or were skipped
    with handling(raise_interrupted):
        while True:
            current = now()
            due = schedule.after(_start(current, settled))
            print_line(console, announcement(due, current, what))
            woken, set_back = _wait(due, now, sleep)
            if set_back:
                print_line(console, f"the clock was set back by {duration(set_back)}")
                continue
            if _instant(woken) - _instant(due) > LATE:
                missed = [due, *schedule.between(due, woken)]
                print_line(console, _skipped(missed, "while the machine slept or its clock was set forward"))
                settled = woken
                continue
            _run(job, due, console, what)
            ended = max(now(), due, key=_instant)
            if missed := schedule.between(due, ended):
                print_line(console, _skipped(missed, f"while the {what} of {shown(due)} ran"))
            settled = ended


def _start(current: datetime, settled: datetime | None) -> datetime:
    """From when on the next time counts: a clock that is set back a little brings no time twice."""
    if settled is None or _instant(settled) - _instant(current) > _CORRECTION:
        return current
    return max(current, settled, key=_instant)


def _wait(due: datetime, now: Clock, sleep: Callable[[float], None]) -> tuple[datetime, timedelta | None]:
    """Sleeps until a time. Returns when it woke up and, if the clock was set back meanwhile, by how much."""
    before = now()
    while (remaining := (_instant(due) - _instant(before)).total_seconds()) > 0:
        piece = min(PIECE_S, remaining)
        sleep(piece)
        current = now()
        set_back = _instant(before) + timedelta(seconds=piece) - _instant(current)
        if set_back > LATE:
            return current, set_back
        before = current
    return before, None


def _run(job: Callable[[datetime], None], due: datetime, console: Console, what: str) -> None:
    try:
        job(due)
    except (UserError, RunError, SourceError, StoreError) as error:
        print_line(console, f"the {what} of {shown(due)} failed: {error}")
    except SystemExit as error:
        if error.code:
            print_line(console, f"the {what} of {shown(due)} failed with exit code {error.code}")
    except Exception as error:  # a schedule of weeks does not end by one failed job
        print_whole(console, traceback.format_exc().rstrip())
        print_line(console, f"the {what} of {shown(due)} failed: {type(error).__name__}: {error}")


def _skipped(missed: list[datetime], when: str) -> str:
    if len(missed) == 1:
        return f"skipped {shown(missed[0])}, which passed {when}"
    number = f"at least {_MOST_COUNTED:,}" if len(missed) >= _MOST_COUNTED else f"{len(missed):,}"
    return f"skipped {number} times from {shown(missed[0])} on, which passed {when}"


def _instant(moment: datetime) -> datetime:
    return moment.astimezone(UTC)


def _complaint(error: CronSimError, fields: list[str]) -> str:
    """What is wrong with an expression of five fields: its field, the value, what is allowed."""
    allowed = ("0 to 59", "0 to 23", "1 to 31, L or LW", "1 to 12 or JAN to DEC", "0 to 7 or SUN to SAT")
    for name, field, value, values in zip(_CRONSIM_FIELDS, _FIELDS, fields, allowed, strict=True):
        if str(error) == f"Bad {name}":
            if name == "day-of-month" and _is_valid([*fields[:3], "*", fields[4]]):
                return f"month {fields[3]!r} has no day {value!r}; name a day that exists, or L for the last one"
            return f"{field} is {value!r}, expected {values}, or *, lists (1,5), ranges (1-5) and steps (*/15) of them"
    return f"{error}; write five fields as '0 3 * * 1', which is Mondays at 3:00"


def _is_valid(fields: list[str]) -> bool:
    try:
        CronSim(" ".join(fields), datetime(2026, 1, 1, tzinfo=UTC))
    except CronSimError:
        return False
    return True


def _zone(name: str) -> tzinfo:
    if name == "UTC":  # known without a database
        return UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise UserError(f"--timezone {name!r} is unknown; {_near_zones(name)}") from None


def _near_zones(name: str) -> str:
    known = sorted(zoneinfo.available_timezones())
    if not known:
        return "this machine has no database of time zones: install the package tzdata, or set --timezone UTC"
    word = re.sub(r"[\s_-]+", "_", name.strip()).lower()
    exact = [zone for zone in known if word in (zone.lower(), zone.lower().rpartition("/")[2])]
    lowered = {zone.lower(): zone for zone in known} | {zone.lower().rpartition("/")[2]: zone for zone in known}
    near = exact or [lowered[one] for one in get_close_matches(word, lowered, n=1, cutoff=0.6)]
    return f"did you mean {near[0]!r}?" if near else "write a name of the IANA database, such as 'Europe/Berlin'"
