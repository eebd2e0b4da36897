"""The local schedule: clock changes, clocks that are set, machines that sleep, jobs that fail or take long."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from rich.console import Console

from spikefleet.errors import RunError, UserError
from spikefleet.retraining.schedule import Schedule, announcement, duration, next_time, run_on_schedule
from spikefleet_tune.interruption import Interrupted

BERLIN = ZoneInfo("Europe/Berlin")
WEEKLY = "0 3 * * 1"


def at(text: str, fold: int = 0) -> datetime:
    """A time in Berlin."""
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN, fold=fold)


class Machine:
    """A machine whose clock moves when it sleeps or works, and by what happens at given times.

    Args:
        start: of the clock.
        end: when SIGTERM comes.
        happenings: for each, at what time of the clock, and by how much it moves then.
    """

    def __init__(self, start: datetime, end: datetime, happenings: list[tuple[datetime, timedelta]] | None = None):
        self.time, self.end = start.astimezone(UTC), end.astimezone(UTC)
        self.happenings = [(moment.astimezone(UTC), by) for moment, by in happenings or []]
        self.ran: list[datetime] = []
        self.started: list[datetime] = []
        self.output = io.StringIO()

    def now(self) -> datetime:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= 30
        self.work(timedelta(seconds=seconds))
        if self.time >= self.end:
            raise Interrupted(signal.SIGTERM)

    def work(self, takes: timedelta) -> None:
        self.time += takes
        while self.happenings and self.time >= self.happenings[0][0]:
            self.time += self.happenings.pop(0)[1]

    def run(
        self,
        expression: str = WEEKLY,
        takes: timedelta = timedelta(minutes=20),
        fails: Callable[[int], BaseException | None] = lambda number: None,
    ) -> list[str]:
        """Runs the schedule until SIGTERM. Returns the times that ran, as clocks in Berlin show them."""

        def job(due: datetime) -> None:
            self.ran.append(due)
            self.started.append(self.time)
            self.work(takes)
            if (error := fails(len(self.ran))) is not None:
                raise error

        console = Console(file=self.output, width=200)
        with pytest.raises(Interrupted):
            run_on_schedule(expression, "Europe/Berlin", job, console, now=self.now, sleep=self.sleep)
        return [due.strftime("%m-%d %H:%M %Z") for due in self.ran]

    @property
    def lines(self) -> list[str]:
        return self.output.getvalue().splitlines()

    @property
    def skips(self) -> list[str]:
        return [line for line in self.lines if line.startswith("skipped")]


def test_jobs_run_at_their_times() -> None:
    machine = Machine(at("2026-11-27 23:00"), at("2026-12-15 00:00"))
    assert machine.run() == ["11-30 03:00 CET", "12-07 03:00 CET", "12-14 03:00 CET"]
    assert machine.started == [due.astimezone(UTC) for due in machine.ran], "to the second"
    assert machine.lines[0] == "next retraining at 2026-11-30 03:00 CET (in 2 d 4 h)"
    assert machine.lines[1] == "next retraining at 2026-12-07 03:00 CET (in 6 d 23 h)"
    assert not machine.skips


def test_a_time_that_spring_leaves_out_comes_when_the_clock_has_gone_forward() -> None:
    machine = Machine(at("2026-03-28 12:00"), at("2026-03-30 12:00"))
    assert machine.run("30 2 * * *") == ["03-29 03:00 CEST", "03-30 02:30 CEST"]
    assert machine.started[0] == datetime(2026, 3, 29, 1, tzinfo=UTC)


def test_two_times_that_spring_leaves_out_are_one() -> None:
    machine = Machine(at("2026-03-28 12:00"), at("2026-03-29 12:00"))
    assert machine.run("15,45 2 * * *", takes=timedelta(seconds=5)) == ["03-29 03:00 CEST"]


@pytest.mark.parametrize("takes", [1, 20, 50, 90])
def test_a_time_that_autumn_shows_twice_comes_once(takes: int) -> None:
    """Also where the job ends before the clock shows that time again: cronsim's next time is then the one that ran."""
    machine = Machine(at("2026-10-24 12:00"), at("2026-10-26 12:00"))
    assert machine.run("30 2 * * *", takes=timedelta(minutes=takes)) == ["10-25 02:30 CEST", "10-26 02:30 CET"]
    assert not machine.skips


def test_a_start_between_both_times_of_autumn_waits_for_the_next_day() -> None:
    machine = Machine(at("2026-10-25 02:10", fold=1), at("2026-10-26 12:00"))
    assert machine.run("30 2 * * *") == ["10-26 02:30 CET"]


def test_intervals_go_through_both_changes() -> None:
    for day, hours in (("2026-03-29", 23), ("2026-10-25", 25)):
        machine = Machine(at(f"{day} 00:00") - timedelta(minutes=1), at(f"{day} 23:59"))
        machine.run("0 * * * *", takes=timedelta(minutes=1))
        assert len(machine.ran) == hours
        gaps = {later - earlier for earlier, later in zip(machine.started, machine.started[1:], strict=False)}
        assert gaps == {timedelta(hours=1)}


def test_times_that_pass_while_the_machine_sleeps_are_skipped() -> None:
    asleep = [(at("2026-11-29 22:00"), timedelta(days=15))]
    machine = Machine(at("2026-11-27 23:00"), at("2026-12-22 00:00"), asleep)
    assert machine.run() == ["12-21 03:00 CET"]
    assert machine.skips == [
        "skipped 3 times from 2026-11-30 03:00 CET on, which passed while the machine slept or its clock was set "
        "forward"
    ]


def test_a_short_sleep_delays_the_job_and_skips_nothing() -> None:
    asleep = [(at("2026-11-30 02:59:50"), timedelta(seconds=45))]
    machine = Machine(at("2026-11-29 23:00"), at("2026-12-01 00:00"), asleep)
    assert machine.run() == ["11-30 03:00 CET"]
    assert machine.started[0] > at("2026-11-30 03:00")
    assert not machine.skips


def test_a_clock_that_is_set_forward_over_no_time_changes_nothing() -> None:
    machine = Machine(at("2026-11-29 12:00"), at("2026-12-01"), [(at("2026-11-29 14:00"), timedelta(hours=3))])
    assert machine.run() == ["11-30 03:00 CET"]
    assert not machine.skips


def test_a_clock_that_is_set_back_brings_no_time_twice() -> None:
    machine = Machine(at("2026-11-30 01:00"), at("2026-12-08"), [(at("2026-11-30 04:00"), timedelta(hours=-3))])
    assert machine.run() == ["11-30 03:00 CET", "12-07 03:00 CET"]
    assert "the clock was set back by 3 h" in machine.lines


def test_a_clock_that_is_set_back_during_the_job_brings_no_time_twice() -> None:
    machine = Machine(at("2026-11-30 01:00"), at("2026-12-08"), [(at("2026-11-30 03:10"), timedelta(hours=-2))])
    assert machine.run() == ["11-30 03:00 CET", "12-07 03:00 CET"]


def test_a_clock_that_is_set_back_before_the_time_has_come_waits_for_it() -> None:
    machine = Machine(at("2026-11-30 04:00"), at("2026-12-01"), [(at("2026-11-30 05:00"), timedelta(hours=-4))])
    assert machine.run() == ["11-30 03:00 CET"], "the machine started by a clock that went ahead"


def test_a_clock_that_was_wrong_by_years_is_not_believed() -> None:
    machine = Machine(at("2036-01-06 12:00"), at("2099-01-01"), [(at("2036-01-08 12:00"), timedelta(days=-3300))])

    def enough(number: int) -> BaseException | None:
        return Interrupted(signal.SIGTERM) if number == 3 else None

    machine.run(fails=enough)
    assert machine.ran[0].year == 2036
    assert [due.year for due in machine.ran[1:]] == [2026, 2027]
    assert machine.ran[1] < at("2026-12-31")


def test_times_that_pass_while_a_job_runs_are_skipped() -> None:
    machine = Machine(at("2026-11-30 00:00"), at("2026-12-15"))
    assert machine.run(takes=timedelta(days=7, hours=1)) == ["11-30 03:00 CET", "12-14 03:00 CET"]
    assert machine.skips[0] == (
        "skipped 2026-12-07 03:00 CET, which passed while the retraining of 2026-11-30 03:00 CET ran"
    )


def test_many_skipped_times_are_one_line() -> None:
    machine = Machine(at("2026-11-30 00:00"), at("2026-12-04"))  # SIGTERM comes while the first job runs
    machine.run("* * * * *", takes=timedelta(days=5))
    assert machine.skips == [
        "skipped at least 1,000 times from 2026-11-30 00:02 CET on, which passed while the retraining of "
        "2026-11-30 00:01 CET ran"
    ]


def test_a_job_that_fails_does_not_end_the_schedule() -> None:
    errors: dict[int, BaseException] = {
        1: UserError("the store [is] away"),
        2: RunError("the loss is nan"),
        3: ZeroDivisionError("by zero"),
        4: SystemExit(2),
        5: SystemExit(0),
    }
    machine = Machine(at("2026-11-30 00:00"), at("2026-12-06 00:00"))
    machine.run("0 3 * * *", fails=errors.get)
    assert len(machine.ran) == 6
    failures = [line for line in machine.lines if "failed" in line]
    assert failures == [
        "the retraining of 2026-11-30 03:00 CET failed: the store [is] away",
        "the retraining of 2026-12-01 03:00 CET failed: the loss is nan",
        "the retraining of 2026-12-02 03:00 CET failed: ZeroDivisionError: by zero",
        "the retraining of 2026-12-03 03:00 CET failed with exit code 2",
    ]
    assert sum("Traceback" in line for line in machine.lines) == 1, "of the unexpected one alone"


def test_an_interrupted_job_ends_the_schedule() -> None:
    machine = Machine(at("2026-11-30 00:00"), at("2026-12-30"))
    machine.run(fails=lambda number: Interrupted(signal.SIGINT))
    assert len(machine.ran) == 1


PROGRAM = """
import sys
from datetime import datetime
from rich.console import Console
from spikefleet.retraining.schedule import run_on_schedule
from spikefleet_tune.interruption import Interrupted
try:
    run_on_schedule("0 3 1 1 *", "UTC", print, Console())
except Interrupted as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_real_wait_at_once(signum: int, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-uc", PROGRAM], stdout=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("next retraining at ")
        time.sleep(0.1)  # it sleeps now
        before = time.monotonic()
        process.send_signal(signum)
        assert process.wait(20) == code
        assert time.monotonic() - before < 10


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("61 3 * * 1", "minute is '61', expected 0 to 59"),
        ("0 24 * * 1", "hour is '24', expected 0 to 23"),
        ("0 3 32 * *", "day of the month is '32', expected 1 to 31"),
        ("0 3 * FEBRUARY *", "month is 'FEBRUARY', expected 1 to 12 or JAN to DEC"),
        ("0 3 * * 8", "day of the week is '8', expected 0 to 7 or SUN to SAT"),
        ("0 3 31 2 *", "month '2' has no day '31'; name a day that exists"),
        ("0 0 3 * * 1", "has 6 fields, expected five: minute, hour"),
        ("", "has 0 fields"),
        ("@weekly", "has 1 field, .*write '0 0 \\* \\* 0'"),
    ],
)
def test_a_bad_expression_is_refused_with_its_field(expression: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        next_time(expression, "UTC")
    assert str(caught.value).startswith(f"--schedule {expression!r}")


@pytest.mark.parametrize(
    ("zone", "remedy"),
    [
        ("Berlin", "did you mean 'Europe/Berlin'?"),
        ("europe/berlin", "did you mean 'Europe/Berlin'?"),
        ("Europe/Berln", "did you mean 'Europe/Berlin'?"),
        ("New York", "did you mean 'America/New_York'?"),
        ("../etc/passwd", "write a name of the IANA database"),
        ("", "write a name of the IANA database"),
        ("a\0b", "write a name of the IANA database"),
    ],
)
def test_an_unknown_time_zone_is_refused_with_a_near_one(zone: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        next_time(WEEKLY, zone)
    assert str(caught.value) == f"--timezone {zone!r} is unknown; " + str(caught.value).partition("; ")[2]
    assert remedy in str(caught.value)


def test_a_machine_without_time_zones_is_told_what_to_install() -> None:
    program = (
        "import sys, zoneinfo; sys.modules['tzdata'] = None; zoneinfo.reset_tzpath([])\n"
        "from spikefleet.retraining.schedule import next_time\n"
        "print(next_time('0 3 * * 1', 'UTC').tzname())\n"
        "try:\n    next_time('0 3 * * 1', 'Europe/Berlin')\nexcept ValueError as error:\n    print(error)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [
        "UTC",
        "--timezone 'Europe/Berlin' is unknown; this machine has no database of time zones: install the package "
        "tzdata, or set --timezone UTC",
    ]


def test_the_next_time_for_a_dry_run() -> None:
    due = next_time(WEEKLY, "Europe/Berlin", now=lambda: at("2026-11-27 22:50"))
    assert announcement(due, at("2026-11-27 22:50")) == "next retraining at 2026-11-30 03:00 CET (in 2 d 4 h)"
    assert Schedule.parse(WEEKLY, "Europe/Berlin").after(due) == at("2026-12-07 03:00"), (
        "a time is after itself no more"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-5, "0 s"),
        (25, "25 s"),
        (60, "1 min"),
        (3 * 3600 + 59, "3 h"),
        (26 * 3600, "1 d 2 h"),
        (86_460, "1 d"),
    ],
)
def test_durations_are_short(seconds: int, text: str) -> None:
    assert duration(timedelta(seconds=seconds)) == text
