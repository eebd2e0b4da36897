"""Tracking of a run in MLflow.

Every call is first written to the run's journal; a thread delivers it (`delivery.py`). A slow or unreachable tracking
server never blocks training, and no record is lost.
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
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from spikefleet.errors import UserError
from spikefleet.files import sha256_of
from spikefleet.tracking.database import database_path, database_uri
from spikefleet.tracking.delivery import MAX_METRICS, MAX_PARAMS_OR_TAGS, SPOOL, Delivery, Sender
from spikefleet.tracking.journal import JOURNAL, Journal, check_record
from spikefleet.tracking.mlflow_client import DATABASE, check_tracking_uri, page_of, public_uri, quiet_mlflow
from spikefleet.tracking.mlflow_pages import NOTE, TABLES, TRAINING_PAGES, table_text, tables_tag
from spikefleet_tune.atomic import replacing
from spikefleet_tune.jsonl_log import Record
from spikefleet_tune.messages import counted

Status = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow's limits (mlflow.utils.validation).
_CHANGED = "changed."
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
MAX_KEY_LENGTH = 250

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackedDataset:
    """A data set as MLflow shows it; `schema`, `profile` and `source` are JSON."""

    name: str
    digest: str
    """At most 36 characters."""
    source: str
    schema: str
    profile: str
    source_type: str = "local"
    context: str = "training"


class Tracker:
    """Tracks one run in one process; its calls do not block.

    A tracker on the same run directory continues the same MLflow run. It drops metrics of steps that were logged
    before, since a resumed run repeats steps with the same values.

    Args:
        journal: of the run.
        tracking_uri: of the server or database.
    """

    def __init__(self, journal: Journal, tracking_uri: str) -> None:
        self._journal = journal
        self._uri = tracking_uri
        self._create: Record = {}
        self._last_step: dict[str, float] = {}
        self._params: dict[str, str] = {}
        self._changed: set[str] = set()
        """Tags of parameters that were logged again with another value."""
        self._tags: set[str] = set()
        self._tables: list[str] = []
        self._datasets: set[tuple[str, str]] = set()
        self._status = "RUNNING"
        self._lossy = False
        self._guard = threading.RLock()
        for number, record in enumerate(journal.records(), start=1):
            try:
                check_record(record)
            except (KeyError, TypeError, ValueError) as error:
                journal.close()
                raise UserError(
                    f"{journal.directory / JOURNAL}, line {number} is damaged: {error!r}; move the file away to "
                    "continue this run as a new run in MLflow"
                ) from None
            self._remember(record)
        self._delivery = Delivery(journal, tracking_uri)
        self._sender = Sender(self._delivery)

    @classmethod
    def open(
        cls, run_dir: Path, run_name: str, experiment: str, tracking_uri: str, parent_run_id: str | None = None
    ) -> "Tracker":
        """Starts or continues the tracking of a run; the server need not be reachable.

        Args:
            run_dir: of the run.
            run_name: of the run in MLflow.
            experiment: name of the MLflow experiment.
            tracking_uri: of the server or database.
            parent_run_id: MLflow's id of the parent run.

        Raises:
            UserError: another process tracks this run, its journal is damaged or cannot be written, or the URI is
                invalid.
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
        """Logs the metrics of a step; a key whose step is not larger than its last one is dropped."""
        with self._guard:
            new = {
                _key(key): float(value) for key, value in metrics.items() if step > self._last_step.get(key, -math.inf)
            }
            for part in _parts(new, MAX_METRICS):
                self._append("metrics", step=step, values=part)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Logs parameters; a value of more than 6,000 characters is truncated, and stored whole as an artifact.

        MLflow's parameters are immutable: the first value stays, and a later one becomes the tag `changed.KEY`.
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
        """Sets tags; a later value replaces an earlier one, and an empty one removes it.

        A value of more than 8,000 characters is truncated, and stored whole as an artifact.
        """
        with self._guard:
            texts = {_key(key): str(value) for key, value in tags.items()}
            if gone := {key: "" for key, text in texts.items() if not text and key in self._tags}:
                self._append("drop_tags", values=gone)
            texts = {key: text for key, text in texts.items() if text}
            self._keep_whole("tags", texts, MAX_TAG_LENGTH)
            for part in _parts(texts, MAX_PARAMS_OR_TAGS):
                fitted = {key: _fit("tags", key, text, MAX_TAG_LENGTH) for key, text in part.items()}
                self._append("tags", values=fitted)

    def describe(self, text: str) -> None:
        """Sets the description on the run's page, Markdown, unless a person wrote one.

        A text of ours is known by its first line: it must be the same in all descriptions of a run.
        """
        self.set_tags({NOTE: text})

    def describe_experiment(self, tags: Mapping[str, str]) -> None:
        """Sets tags that the run's experiment lacks, such as those of `mlflow_pages.experiment_page`."""
        with self._guard:
            self._append("experiment", values={_key(key): str(value) for key, value in tags.items()})

    def log_dataset(self, dataset: TrackedDataset) -> None:
        """Logs the data of the run, which MLflow shows in its list of runs; once for each content."""
        with self._guard:
            if (dataset.name, dataset.digest) not in self._datasets:
                self._append("dataset", **asdict(dataset))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Uploads the current content of a file under its own name into a folder of the run's artifacts.

        Raises:
            UserError: the file does not exist.
        """
        if not path.is_file():
            raise UserError(f"artifact {path} does not exist")
        self._spool(sha256_of(path), posixpath.join(folder, path.name), lambda copy: shutil.copyfile(path, copy))

    def log_dict(self, content: object, artifact: str) -> None:
        """Uploads plain data as a JSON artifact, for example `config.json`."""
        self._log_bytes(json.dumps(content, indent=2, ensure_ascii=False).encode(), artifact)

    def show_table(self, rows: Sequence[Mapping[str, object]], artifact: str) -> None:
        """Uploads rows with the same columns as a JSON artifact, such as `layers.json`, which MLflow shows as a table.

        Raises:
            UserError: there are no rows.
        """
        if not rows:
            raise UserError(f"artifact {artifact} needs at least one row")
        with self._guard:
            self._log_bytes(table_text(rows).encode(), artifact)
            if artifact not in self._tables:
                self.set_tags({TABLES: tables_tag([*self._tables, artifact])})

    def log_table(self, rows: Sequence[Mapping[str, object]], artifact: str) -> None:
        """Uploads rows with the same columns as a Parquet artifact, for example `layers/epoch-0001.parquet`.

        Raises:
            UserError: there are no rows.
        """
        import pyarrow
        import pyarrow.parquet

        if not rows:
            raise UserError(f"artifact {artifact} needs at least one row")
        table = pyarrow.Table.from_pylist([dict(row) for row in rows])
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(table, sink)
        self._log_bytes(sink.getvalue().to_pybytes(), artifact)

    def flush(self, wait_s: float) -> int:
        """Waits until all records are delivered, at most `wait_s` seconds; returns how many are not."""
        return self._sender.flush(wait_s)

    def finish(self, status: Status, wait_s: float) -> int:
        """Closes the run and waits for the delivery.

        Args:
            status: final status of the run in MLflow.
            wait_s: seconds to wait at most.

        Returns:
            The number of records that were not delivered; they stay in the journal.
        """
        self._append("status", status=status)
        undelivered = self._sender.flush(wait_s)
        self._sender.stop()
        if undelivered:
            log.warning(
                "%s of run %s not delivered to %s (%s); kept in %s, and delivered when the run is resumed, or by: "
                "spikefleet tracking sync %s",
                counted(undelivered, "tracking record"),
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
        """A link to the run, or the command that opens the database in MLflow's UI."""
        delivered = self._journal.delivered
        if not self._uri.startswith("http") or delivered.run_id is None:
            return page_of(self._uri)
        page = f"#/experiments/{delivered.experiment_id}/runs/{delivered.run_id}"
        return f"{public_uri(self._uri).rstrip('/')}/{page}?{TRAINING_PAGES}"

    def _append(self, kind: str, **content: Any) -> None:
        record = {"kind": kind, "time": int(time.time() * 1000), **content}
        try:
            self._journal.append(record)
        except OSError as error:
            # Training continues without tracking; its next checkpoint raises an error if the disk is full.
            if not self._lossy:
                log.warning("%s: tracking records are lost: %s", self._journal.directory / JOURNAL, error)
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
                self._tags |= record["values"].keys()
                if TABLES in record["values"]:
                    self._tables = [table["path"] for table in json.loads(record["values"][TABLES])]
            case "drop_tags":
                self._tags -= record["values"].keys()
            case "dataset":
                self._datasets.add((record["name"], record["digest"]))
            case "status":
                self._status = record["status"]

    def _keep_whole(self, folder: str, texts: Mapping[str, str], limit: int) -> None:
        for key, text in texts.items():
            if len(text) > limit:
                self._log_bytes(text.encode(), _whole_text(folder, key))

    def _log_bytes(self, content: bytes, artifact: str) -> None:
        self._spool(hashlib.sha256(content).hexdigest(), artifact, lambda copy: copy.write_bytes(content))

    def _spool(self, digest: str, artifact: str, write: Callable[[Path], object]) -> None:
        folder, name = _spooled(self._journal, digest, artifact, write)
        self._append("artifact", digest=digest[:16], name=name, folder=folder)


def _spooled(journal: Journal, digest: str, artifact: str, write: Callable[[Path], object]) -> tuple[str, str]:
    """Stores the content under its hash, once: the source may change before the upload. Returns folder and name."""
    folder, name = posixpath.split(_artifact_path(artifact))
    directory = journal.directory / SPOOL / digest[:16]
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / name).exists():
        with replacing(directory / name) as partial:
            write(partial)
    return folder, name


def annotate(run_dir: Path, tags: Mapping[str, str]) -> None:
    """Adds tags to the journal of a run that has ended; `sync` delivers them.

    Raises:
        UserError: a process tracks the run, its journal is damaged or cannot be written, or a key is invalid.
    """
    with closing(_open_journal(run_dir)) as journal:
        values = {_key(key): _fit("tags", key, text, MAX_TAG_LENGTH) for key, text in tags.items()}
        journal.append({"kind": "tags", "time": int(time.time() * 1000), "values": values})


def attach(run_dir: Path, path: Path, folder: str) -> None:
    """Adds an artifact to the journal of a run that has ended; `sync` delivers it.

    Args:
        run_dir: of the run.
        path: the file.
        folder: of the artifact.

    Raises:
        UserError: a process tracks the run, or its journal is damaged or cannot be written.
    """
    digest = sha256_of(path)
    with closing(_open_journal(run_dir)) as journal:
        folder, name = _spooled(journal, digest, f"{folder}/{path.name}", lambda copy: shutil.copyfile(path, copy))
        record = {"kind": "artifact", "time": int(time.time() * 1000)}
        journal.append({**record, "digest": digest[:16], "name": name, "folder": folder})


def sync(run_dir: Path, tracking_uri: str | None = None) -> int:
    """Delivers the remaining tracking records of a run that has ended.

    Args:
        run_dir: of the run.
        tracking_uri: of the server; by default MLFLOW_TRACKING_URI, else the one that the run used.

    Returns:
        The number of delivered records.

    Raises:
        UserError: the directory has no journal, a process still tracks the run, or the delivery fails.
    """
    quiet_mlflow()
    if not (run_dir / JOURNAL).is_file():
        raise UserError(f"{run_dir} has no {JOURNAL}; expected the directory of a run, for example runs/my-run")
    journal = _open_journal(run_dir)
    try:
        named = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip()
        uri = named or _where_now(journal.delivered.tracking_uri, run_dir.resolve())
        check_tracking_uri(uri)
        delivery = Delivery(journal, uri)
        before = journal.pending
        try:
            while delivery.attempt():
                pass
        except Exception as error:
            raise UserError(
                f"{run_dir}: {public_uri(uri)} did not take {counted(journal.pending, 'record')}: {delivery.problem}"
            ) from error
        return before
    finally:
        journal.close()


def _where_now(recorded: str, run_dir: Path) -> str:
    """The tracking URI that a run was delivered to; that of the moved or copied runs directory, if it is in one."""
    before = database_path(recorded)
    near = next((place for place in run_dir.parents if (place / DATABASE).is_file()), None)
    if before is None or near is None:
        return recorded
    copied = (before.parent / run_dir.relative_to(near) / JOURNAL).is_file()
    return database_uri(near / DATABASE) if copied or not before.exists() else recorded


def _open_journal(run_dir: Path) -> Journal:
    try:
        return Journal(run_dir)
    except OSError as error:
        raise UserError(
            f"{run_dir / JOURNAL} cannot be written: {error.strerror or error}; set another --runs-dir"
        ) from error


def _parts(values: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    items = iter(values.items())
    while part := dict(islice(items, size)):
        yield part


def _key(key: str) -> str:
    """Checks a key by MLflow's rules: MLflow itself would reject it only in the background. Raises UserError."""
    if not re.fullmatch(r"[/\w.\- :]+", key) or len(key) > MAX_KEY_LENGTH or _leaves_folder(key):
        raise UserError(
            f"tracking key {key[:80]!r} must have 1 to {MAX_KEY_LENGTH} letters, digits, '_', '-', '.', ':', spaces "
            "and single '/' between words"
        )
    return key


def _artifact_path(path: str) -> str:
    if not re.fullmatch(r"[/\w.\- ()+=@,]{1,500}", path) or _leaves_folder(path):
        raise UserError(f"artifact {path[:80]!r} must be a relative path without '..' and special characters")
    return path


def _leaves_folder(path: str) -> bool:
    return posixpath.normpath(path) != path or path.startswith(("/", "..")) or path == "."


def _whole_text(folder: str, key: str) -> str:
    name = re.sub(r"[^\w.-]", "_", key)
    return f"{folder}/{name}.txt"


def _fit(folder: str, key: str, text: str, limit: int) -> str:
    note = f"... (whole: {_whole_text(folder, key)})"
    return text if len(text) <= limit else text[: limit - len(note)] + note
