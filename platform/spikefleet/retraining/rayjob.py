"""A retraining as a RayJob of a fixed name: created if none is running, and followed to its end.

A scheduler that waits for this command waits for the retraining, and two of them cannot run at once: the second create
of the same name is refused by the API server.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml

from spikefleet.errors import RunError, UserError
from spikefleet.retraining.kubernetes_api import Job, NoAnswerError, NotUniqueError, RayJobs

POLL_S = 10.0
PATIENCE_S = 900.0
"""For how long an API server that does not answer is asked again."""

_NAME = re.compile(r"retrain-(?=[a-z0-9-]*[a-z0-9]$)[a-z0-9-]{1,39}")  # KubeRay allows 47 characters
_MADE_BY = "spikefleet/made-by"
_ENDED = ("Complete", "Failed", "ValidationFailed")

_Answer = TypeVar("_Answer")


def read_template(path: Path, namespace: str) -> Job:
    """The RayJob to create.

    Args:
        path: a YAML file with one RayJob; its name says which model is retrained.
        namespace: where it will be created.

    Raises:
        UserError: the file cannot be read, is no RayJob, has a name that KubeRay would refuse, or names another
            namespace.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--template={path}: cannot be read as YAML: {reason}") from None
    kind = (document.get("apiVersion"), document.get("kind")) if isinstance(document, dict) else None
    if kind != ("ray.io/v1", "RayJob"):
        raise UserError(f"--template={path}: must be one RayJob of ray.io/v1, is {kind or type(document).__name__}")
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"--template={path}: metadata.name {name!r}: must be retrain-MODEL in lower-case letters, digits and "
            "hyphens, at most 47 characters"
        )
    if not isinstance(document.get("spec"), dict):
        raise UserError(f"--template={path}: spec is missing; give that of a RayJob")
    if metadata.setdefault("namespace", namespace) != namespace:
        raise UserError(
            f"--template={path}: metadata.namespace {metadata['namespace']!r}: must be {namespace!r}, or be left out"
        )
    return document


class Retrainer:
    """Creates a job and follows it.

    Args:
        jobs: where it is created.
        template: the job, of `read_template`.
        say: called with each line.
        poll_s: seconds between two questions.
        patience_s: for how long an API server that does not answer is asked again.
    """

    def __init__(
        self,
        jobs: RayJobs,
        template: Job,
        say: Callable[[str], None],
        poll_s: float = POLL_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.name: str = template["metadata"]["name"]
        self.created = False
        """Whether the job that is followed was created, so that it keeps running when this command stops."""
        self._jobs, self._template, self._say = jobs, template, say
        self._poll_s, self._patience_s = poll_s, patience_s
        self._mark = uuid.uuid4().hex

    def run(self) -> str:
        """Creates the job, unless one of its name is running, and follows it to its end.

        Returns:
            The last line: that it succeeded, or was skipped.

        Raises:
            UserError: the API server refuses the account or the manifest.
            RunError: the job failed, was deleted or replaced, or the API server did not answer for too long.
        """
        job = self._create()
        if job is None:
            return f"skipped: RayJob {self.name} has not ended yet"
        self.created = True
        self._say(f"created RayJob {self.name} in {self._jobs.namespace}")
        return self._follow(job["metadata"]["uid"])

    def _create(self) -> Job | None:
        found = self._patiently(lambda: self._jobs.read(self.name))
        if found is not None:
            if not (_has_ended(found) or _is_being_deleted(found)):
                return None
            if not self._remove(found):
                return None
        self._template["metadata"].setdefault("annotations", {})[_MADE_BY] = self._mark
        return self._patiently(self._post)

    def _post(self) -> Job | None:
        try:
            return self._jobs.create(self._template)
        except NotUniqueError:
            # It may be ours: an earlier create whose answer was lost.
            there = self._jobs.read(self.name)
            return there if there is not None and _annotation(there) == self._mark else None

    def _remove(self, found: Job) -> bool:
        """Whether the ended job is gone; not if another scheduler has put a new one in its place."""
        uid = found["metadata"]["uid"]
        if not _is_being_deleted(found):
            try:
                self._patiently(lambda: self._jobs.delete(self.name, uid))
            except NotUniqueError:
                return False
            self._say(f"deleted RayJob {self.name}, which ended as {_state(found)}")
        until = time.monotonic() + self._patience_s
        while (there := self._patiently(lambda: self._jobs.read(self.name))) is not None:
            if there["metadata"]["uid"] != uid:
                return False
            if time.monotonic() > until:
                raise RunError(f"RayJob {self.name} is being deleted, but is still there; look at its finalizers")
            time.sleep(self._poll_s)
        return True

    def _follow(self, uid: str) -> str:
        shown = ""
        while True:
            job = self._patiently(lambda: self._jobs.read(self.name))
            if job is None or job["metadata"]["uid"] != uid:
                raise RunError(f"RayJob {self.name} was {'deleted' if job is None else 'replaced'} before it ended")
            state = _state(job)
            if state != shown:
                self._say(f"RayJob {self.name}: {state}")
                shown = state
            if _has_ended(job):
                if job["status"].get("jobStatus") == "SUCCEEDED":
                    return f"succeeded: RayJob {self.name}"
                raise RunError(f"RayJob {self.name} failed: {_why(job)}")
            time.sleep(self._poll_s)

    def _patiently(self, ask: Callable[[], _Answer]) -> _Answer:
        until, told = time.monotonic() + self._patience_s, ""
        while True:
            try:
                answer = ask()
            except NoAnswerError as error:
                if time.monotonic() > until:
                    left = f"; RayJob {self.name} keeps running" if self.created else ""
                    raise RunError(
                        f"{self._jobs.server} did not answer for {self._patience_s:.0f} s ({error}){left}"
                    ) from None
                if str(error) != told:
                    told = str(error)
                    self._say(f"{self._jobs.server} does not answer ({told}); asking again")
                time.sleep(min(self._poll_s, 5.0))
            else:
                if told:
                    self._say(f"{self._jobs.server} answers again")
                return answer


def _status(job: Job) -> dict[str, object]:
    return job.get("status") or {}


def _has_ended(job: Job) -> bool:
    return _status(job).get("jobDeploymentStatus") in _ENDED


def _is_being_deleted(job: Job) -> bool:
    return "deletionTimestamp" in job["metadata"]


def _annotation(job: Job) -> str | None:
    return (job["metadata"].get("annotations") or {}).get(_MADE_BY)


def _state(job: Job) -> str:
    """Such as `Running, job RUNNING`: of the cluster, and of the command on it."""
    status = _status(job)
    command = status.get("jobStatus")
    return str(status.get("jobDeploymentStatus") or "new") + (f", job {command}" if command else "")


def _why(job: Job) -> str:
    status = _status(job)
    said = [str(status[key])[:500] for key in ("reason", "message") if status.get(key)]
    return ": ".join([_state(job), *said])
