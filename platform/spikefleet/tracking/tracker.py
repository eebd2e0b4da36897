"""Tracking of a run in MLflow.

Every call is written to the run's journal first and delivered by a thread (`delivery.py`), so that a tracking server
that is slow or away never holds up a training, and nothing is lost.
"""

import hashlib
import json
import logging
import math
import os
import posixpath
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spikefleet.errors import UserError
from spikefleet.files import sha256_of
from spikefleet.tracking.delivery import MAX_METRICS, MAX_PARAMS_OR_TAGS, SPOOL, Delivery, Sender
from spikefleet.tracking.journal import JOURNAL, Journal
from spikefleet.tracking.mlflow_client import check_tracking_uri, public_uri, quiet_mlflow
from spikefleet_tune.atomic import replacing
from spikefleet_tune.jsonl_log import Record

Status = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's limits (mlflow.utils.validation).
_CHANGED = "changed."
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
MAX_KEY_LENGTH = 250

log = logging.getLogger(__name__)


class Tracker:
    """The tracking of one run, used by one process; its calls return at once.

    A tracker that is opened on the same run directory again continues the same MLflow run. Metrics of a step that has
    been logged before are dropped then: a resumed run repeats steps, with the same values.
    """

    def __init__(self, journal: Journal, tracking_uri: str) -> None:
        self._journal = journal
        self._uri = tracking_uri
        self._create: Record = {}
        self._last_step: dict[str, float] = {}
        self._params: dict[str, str] = {}
        self._changed: set[str] = set()
        """Tags of parameters that were logged with another value later."""
        self._status = "RUNNING"
        self._lossy = False
        self._guard = threading.RLock()
        for record in journal.records():
            self._remember(record)
        self._delivery = Delivery(journal, tracking_uri)
        self._sender = Sender(self._delivery)

    @classmethod
    def open(
        cls, run_dir: Path, run_name: str, experiment: str, tracking_uri: str, parent_run_id: str | None = None
    ) -> "Tracker":
        """Begins or continues the tracking of the run in `run_dir`; the server need not be up.

        Raises:
            UserError: another process tracks this run, its journal is damaged or cannot be written, or the URI is not
                one of a tracking server.
        """
        quiet_mlflow()
        check_tracking_uri(tracking_uri)
        tracker = cls(_open_journal(run_dir), tracking_uri)
        if not tracker._create:
            tracker._append(
                "create", uid=uuid.uuid4().hex, run_name=run_name, experiment=experiment, parent_run_id=parent_run_id
            )
        elif tracker._status != "RUNNING":
            tracker._append("status", status="RUNNING")
        tracker._sender.start()
        return tracker

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs figures of one step; a key whose step is not above its last one is dropped."""
        with self._guard:
            new = {
                _key(key): float(value) for key, value in metrics.items() if step > self._last_step.get(key, -math.inf)
            }
            for part in _parts(new, MAX_METRICS):
                self._append("metrics", step=step, values=part)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Logs parameters; a value of more than 6,000 characters is cut and goes whole into an artifact.

        MLflow never changes a parameter: the value of the first call stays, and a later one becomes tag `changed.KEY`.
        """
        with self._guard:
            fitted = {_key(key): _fit("params", key, str(value), MAX_PARAM_LENGTH) for key, value in params.items()}
            again = {key for key, value in fitted.items() if self._params.get(key, value) != value}
            again |= {key for key in fitted if _CHANGED + key in self._changed}
            self.set_tags({_CHANGED + key: params[key] for key in again})
            new = {key: value for key, value in fitted.items() if key not in self._params}
            self._keep_whole("params", {key: str(params[key]) for key in new}, MAX_PARAM_LENGTH)
            for part in _parts(new, MAX_PARAMS_OR_TAGS):
                self._append("params", values=part)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Sets tags; the last value of a tag stays. More than 8,000 characters are treated as in `log_params`."""
        with self._guard:
            texts = {_key(key): str(value) for key, value in tags.items()}
            self._keep_whole("tags", texts, MAX_TAG_LENGTH)
            for part in _parts(texts, MAX_PARAMS_OR_TAGS):
                fitted = {key: _fit("tags", key, text, MAX_TAG_LENGTH) for key, text in part.items()}
                self._append("tags", values=fitted)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Stores a copy of a file as it is now; it is uploaded under its own name into `folder`."""
        if not path.is_file():
            raise UserError(f"artifact {path}: there is no such file")
        self._spool(sha256_of(path), posixpath.join(folder, path.name), lambda copy: shutil.copyfile(path, copy))

    def log_dict(self, content: object, artifact: str) -> None:
        """Stores something that JSON can hold as an artifact, for example `config.json`."""
        self._log_bytes(json.dumps(content, indent=2, ensure_ascii=False).encode(), artifact)

    def log_table(self, rows: Sequence[Mapping[str, object]], artifact: str) -> None:
        """Stores rows with the same columns as a Parquet artifact, for example `health/layers.parquet`."""
        import pyarrow
        import pyarrow.parquet

        if not rows:
            raise UserError(f"artifact {artifact}: a table needs at least one row")
        table = pyarrow.Table.from_pylist([dict(row) for row in rows])
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink)
        self._log_bytes(sink.getvalue().to_pybytes(), artifact)

    def flush(self, wait_s: float) -> int:
        """Waits until all is delivered, at most `wait_s` seconds; returns how many records are not."""
        return self._sender.flush(wait_s)

    def finish(self, status: Status, wait_s: float) -> int:
        """Closes the run; returns how many records could not be delivered within `wait_s` seconds (they are kept)."""
        self._append("status", status=status)
        undelivered = self._sender.flush(wait_s)
        self._sender.stop()
        if undelivered:
            log.warning(
                "%d tracking records of run %s have not reached %s (%s); they are kept in %s and go out when the run "
                "is started again, or by: spikefleet tracking sync %s",
                undelivered,
                self._create["run_name"],
                public_uri(self._uri),
                self._delivery.problem or "it is slow",
                self._journal.directory,
                self._journal.directory,
            )
        return undelivered

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the server has created it."""
        return self._journal.delivered.run_id

    @property
    def run_url(self) -> str:
        """Where to look at the run: a link, or the command that opens the database."""
        delivered = self._journal.delivered
        if not self._uri.startswith("http"):
            return f"mlflow ui --backend-store-uri {public_uri(self._uri)}"
        if delivered.run_id is None:
            return public_uri(self._uri)
        return f"{public_uri(self._uri).rstrip('/')}/#/experiments/{delivered.experiment_id}/runs/{delivered.run_id}"

    def _append(self, kind: str, **content: Any) -> None:
        record = {"kind": kind, "time": int(time.time() * 1000), **content}
        try:
            self._journal.append(record)
        except OSError as error:
            # A training is worth more than its curves; its next checkpoint reports a full disk as an error of its own.
            if not self._lossy:
                log.warning("%s: tracking records are being lost: %s", self._journal.directory / JOURNAL, error)
            self._lossy = True
            return
        self._remember(record)
        self._sender.wake()

    def _remember(self, record: Record) -> None:
        match record["kind"]:
            case "create":
                self._create = record
            case "metrics":
                self._last_step.update(dict.fromkeys(record["values"], record["step"]))
            case "params":
                self._params |= record["values"]
            case "tags":
                self._changed |= {key for key in record["values"] if key.startswith(_CHANGED)}
            case "status":
                self._status = record["status"]

    def _keep_whole(self, folder: str, texts: Mapping[str, str], limit: int) -> None:
        for key, text in texts.items():
            if len(text) > limit:
                self._log_bytes(text.encode(), _whole_text(folder, key))

    def _log_bytes(self, content: bytes, artifact: str) -> None:
        self._spool(hashlib.sha256(content).hexdigest(), artifact, lambda copy: copy.write_bytes(content))

    def _spool(self, digest: str, artifact: str, write: Callable[[Path], object]) -> None:
        """Keeps the content under its hash: the source may change later, and the same content is kept once."""
        folder, name = posixpath.split(_artifact_path(artifact))
        directory = self._journal.directory / SPOOL / digest[:16]
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / name).exists():
            with replacing(directory / name) as partial:
                write(partial)
        self._append("artifact", digest=digest[:16], name=name, folder=folder)


def sync(run_dir: Path, tracking_uri: str | None = None) -> int:
    """Delivers what a run that has ended left behind; returns the number of records delivered.

    The server is `tracking_uri`, else MLFLOW_TRACKING_URI, else the one that the run used.

    Raises:
        UserError: the directory holds no journal, a process still tracks the run, or the server does not take them.
    """
    quiet_mlflow()
    if not (run_dir / JOURNAL).is_file():
        raise UserError(f"{run_dir}: no {JOURNAL} there; give the directory of a run, for example runs/my-run")
    journal = _open_journal(run_dir)
    try:
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip() or journal.delivered.tracking_uri
        check_tracking_uri(uri)
        delivery = Delivery(journal, uri)
        before = journal.pending
        try:
            while delivery.attempt():
                pass
        except Exception as error:
            raise UserError(
                f"{run_dir}: {journal.pending} records have not reached {public_uri(uri)}: {delivery.problem}"
            ) from error
        return before
    finally:
        journal.close()


def _open_journal(run_dir: Path) -> Journal:
    try:
        return Journal(run_dir)
    except OSError as error:
        raise UserError(
            f"{run_dir}: the tracking journal cannot be written there: {error.strerror or error}"
        ) from error


def _parts(values: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    items = iter(values.items())
    while part := dict(islice(items, size)):
        yield part


def _key(key: str) -> str:
    """A name that MLflow takes (its rules; checked here because a refusal would come when nobody sees it)."""
    if not re.fullmatch(r"[/\w.\- :]+", key) or len(key) > MAX_KEY_LENGTH or _leaves_folder(key):
        raise UserError(
            f"tracking key {key[:80]!r}: use 1 to {MAX_KEY_LENGTH} letters, digits, '_', '-', '.', ':', spaces and "
            f"single '/' between words"
        )
    return key


def _artifact_path(path: str) -> str:
    if not re.fullmatch(r"[/\w.\- ()+=@,]{1,500}", path) or _leaves_folder(path):
        raise UserError(f"artifact {path[:80]!r}: give a relative path without '..' and special characters")
    return path


def _leaves_folder(path: str) -> bool:
    return posixpath.normpath(path) != path or path.startswith(("/", "..")) or path == "."


def _whole_text(folder: str, key: str) -> str:
    name = re.sub(r"[^\w.-]", "_", key)
    return f"{folder}/{name}.txt"


def _fit(folder: str, key: str, text: str, limit: int) -> str:
    note = f"... (whole: {_whole_text(folder, key)})"
    return text if len(text) <= limit else text[: limit - len(note)] + note
