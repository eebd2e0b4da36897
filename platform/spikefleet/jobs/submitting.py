"""Submits a command, or finds the job that already does the same."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import count

from spikefleet.errors import RunError, UserError
from spikefleet.jobs.code_package import packed
from spikefleet.jobs.server import Job, JobServer
from spikefleet.jobs.submission import Submission
from spikefleet.status import Announce, silent

_NAMED = ("train", "tune")
"""Commands that have an option --name."""


def submit_or_follow(server: JobServer, submission: Submission, say: Announce = silent) -> tuple[Job, bool]:
    """Submits a command, unless a job that has not ended does the same.

    A job that has ended keeps its id: the next one gets `-2`, `-3` and so on behind it; so does one whose id another
    run's job has: run `a-2` has the id of the second job of run `a`. A run resumes by its name.

    Args:
        server: of the cluster.
        submission: the command.
        say: names files that are not sent.

    Returns:
        the job; whether it was submitted now.

    Raises:
        UserError: a job works on the run with another configuration.
    """
    with nullcontext() if submission.code is None else packed(submission.code, say) as code:
        for number in count(1):
            name = submission.id if number == 1 else f"{submission.id}-{number}"
            job = server.get(name)
            if job is not None and (not job.alive or not _of_the_same_run(job, submission)):
                continue
            new = job is None
            if job is None:
                try:
                    server.submit(name, submission.entry_point(name), submission.metadata(), code)
                except RunError:  # maybe since somebody else has submitted it meanwhile
                    if server.get(name) is None:
                        raise
                    new = False
                job = server.get(name)
            if job is None:
                raise RunError(f"job {name} was submitted to {server.address}, which does not know it; submit it again")
            if not _of_the_same_run(job, submission):
                continue
            return _same(job, submission), new
    raise AssertionError("there is always a next number")


def _of_the_same_run(job: Job, submission: Submission) -> bool:
    return (job.kind, job.run) == (submission.kind, submission.run)


def _same(job: Job, submission: Submission) -> Job:
    if job.metadata.get("digest") != submission.digest:
        other = "set another --name" if submission.kind in _NAMED else "submit this one when it has ended"
        raise UserError(
            f"job {job.id} works on {submission.kind} {submission.run!r} with another configuration, submitted by "
            f"{job.metadata.get('user', 'somebody')}; stop it (`spikefleet stop {job.id}`), or {other}"
        )
    return job
