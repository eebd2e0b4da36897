"""Delivery of journaled tracking records to MLflow; requests are idempotent, since a crash may repeat one.

* The run is looked up by the tag `spikefleet.run_uid` before it is created.
* MLflow's metric table has the primary key (run, key, timestamp, step, value), and a record keeps its first timestamp.
* Parameters, tags, artifacts and the status are overwritten with the same content, in order.
* A data set is one input of its run, however often it is logged. A tag that is gone is removed without complaint.
* An experiment gets the tags that it lacks, and a run keeps a description that a person wrote.
"""

import getpass
import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spikefleet.errors import UserError
from spikefleet.tracking.database import database_path
from spikefleet.tracking.journal import Delivered, Journal
from spikefleet.tracking.mlflow_client import public_uri, without_credentials
from spikefleet.tracking.mlflow_pages import EXPERIMENT_ID, NOTE
from spikefleet.tracking.relocation import ARTIFACTS, RUN_UID_TAG, ready_database
from spikefleet.tracking.server_problems import server_cause
from spikefleet_tune.jsonl_log import Entry, Record

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

SPOOL = "tracking-artifacts"
"""Folder in the run's directory with the files of artifact records."""

# MLflow's limits (mlflow.utils.validation).
MAX_METRICS = 1000
MAX_PARAMS_OR_TAGS = 100

READ_BYTES = 128 * 1024  # of the journal at a time; far below MLflow's limit of 1 MB a request
GATHER_S = 0.5  # records of this period go into one request
MAX_BACKOFF_S = 10.0

log = logging.getLogger(__name__)


class Delivery:
    """Sends the records of a journal to MLflow, in order. Used by one thread.

    Args:
        journal: the journal.
        tracking_uri: of the server or database.
    """

    def __init__(self, journal: Journal, tracking_uri: str) -> None:
        self.journal = journal
        self.problem: str | None = None  # why the last attempt failed
        self._uri = tracking_uri
        self._client: Any = None
        if journal.delivered.tracking_uri != public_uri(tracking_uri):
            # Another server has none of the records: send all.
            journal.mark_delivered(Delivered(tracking_uri=public_uri(tracking_uri)))

    def attempt(self) -> bool:
        """Sends the next records.

        Returns:
            False if no records are left.

        Raises:
            Exception: any error of MLflow or of the network; the records stay in the journal.
            RunGoneError: the run or its experiment was deleted in MLflow.
        """
        try:
            batch = next_batch(self.journal.unsent(READ_BYTES))
            if batch:
                self.journal.sync()  # after a power failure MLflow must not have more than the journal
                self._deliver(batch)
        except Exception as error:
            self.problem = self._reason(error)
            raise
        self.problem = None
        return bool(batch)

    def _deliver(self, batch: list[Entry]) -> None:
        """Sends a batch. A record that the server rejects permanently is skipped, so that it does not block others."""
        delivered = self.journal.delivered
        try:
            delivered = self._send(batch, delivered)
        except Exception as error:
            if batch[0].record["kind"] == "create" or not self._refused(error):
                raise
            self._check_run(delivered)
            if len(batch) > 1:
                middle = len(batch) // 2
                self._deliver(batch[:middle])
                self._deliver(batch[middle:])
                return
            log.warning("MLflow rejected a record (%s): %s", batch[0].record["kind"], self._reason(error))
        self.journal.mark_delivered(replace(delivered, offset=batch[-1].end, records=delivered.records + len(batch)))

    def _refused(self, error: Exception) -> bool:
        """Whether MLflow rejects this request permanently, as opposed to an error of a proxy or the network."""
        from mlflow.exceptions import MlflowException, RestException
        from requests import HTTPError

        if isinstance(error, HTTPError) and error.response is not None:
            return error.response.status_code in (400, 413, 422)
        if isinstance(error, MlflowException) and (
            isinstance(error, RestException) or not self._uri.startswith("http")
        ):
            return error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")
        return isinstance(error, UserError)

    def _send(self, batch: list[Entry], delivered: Delivered) -> Delivered:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        if self._client is None:
            ready_database(self._uri)
            self._client = MlflowClient(tracking_uri=self._uri)
        first = batch[0].record
        match first["kind"]:
            case "create":
                experiment_id = self._experiment(first["experiment"])
                return replace(delivered, experiment_id=experiment_id, run_id=self._run(first, experiment_id))
            case "status":
                if first["status"] == "RUNNING":
                    self._client.update_run(delivered.run_id, status="RUNNING")
                else:
                    self._client.set_terminated(delivered.run_id, status=first["status"], end_time=first["time"])
            case "artifact":
                file = self.journal.directory / SPOOL / first["digest"] / first["name"]
                if not file.is_file():
                    raise UserError(f"artifact {file} was removed before its upload")
                self._client.log_artifact(delivered.run_id, str(file), first["folder"] or None)
            case "dataset":
                self._client.log_inputs(delivered.run_id, datasets=[_dataset_input(first)])
            case "experiment":
                self._complete_experiment(str(delivered.experiment_id), first["values"])
            case "drop_tags":
                for key in first["values"]:
                    self._drop_tag(str(delivered.run_id), key)
            case _:
                metrics: list[Metric] = []
                params: dict[str, str] = {}
                tags: dict[str, str] = {}
                for record in (entry.record for entry in batch):
                    match record["kind"]:
                        case "metrics":
                            time, step = record["time"], record["step"]
                            metrics += [Metric(key, value, time, step) for key, value in record["values"].items()]
                        case "params":
                            params |= record["values"]
                        case "tags":
                            tags |= record["values"]
                if NOTE in tags and self._is_foreign_note(str(delivered.run_id), tags[NOTE]):
                    del tags[NOTE]
                self._client.log_batch(
                    delivered.run_id,
                    metrics=metrics,
                    params=[Param(*item) for item in params.items()],
                    tags=[RunTag(*item) for item in tags.items()],
                )
        return delivered

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self._client.create_experiment(name, artifact_location=self._artifact_location())
            except MlflowException:  # another run may have created it
                experiment = self._client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise RunGoneError(f"experiment {name} was deleted in MLflow; restore it there, or set tracking.experiment")
        return experiment.experiment_id

    def _complete_experiment(self, experiment_id: str, tags: Mapping[str, str]) -> None:
        """Sets tags that the experiment lacks; those of a person, or of an earlier run, stay."""
        held = self._client.get_experiment(experiment_id).tags
        for key, value in tags.items():
            if key not in held:
                self._client.set_experiment_tag(experiment_id, key, value.replace(EXPERIMENT_ID, experiment_id))

    def _drop_tag(self, run_id: str, key: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.delete_tag(run_id, key)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._check_run(replace(self.journal.delivered, run_id=run_id))  # else it is the run that is gone

    def _is_foreign_note(self, run_id: str, note: str) -> bool:
        """Whether the run has a description that begins otherwise than ours, so that a person wrote it."""
        held = self._client.get_run(run_id).data.tags.get(NOTE, "")
        return bool(held.strip()) and held.partition("\n")[0] != note.partition("\n")[0]

    def _artifact_location(self) -> str | None:
        """None for a server, which decides itself; MLflow's default for a database is the current directory."""
        if (database := database_path(self._uri)) is not None:
            return (database.resolve().parent / ARTIFACTS).as_uri()
        if self._uri.startswith(("http", "databricks")):
            return None
        return (self.journal.directory.resolve().parent / ARTIFACTS).as_uri()

    def _run(self, create: Record, experiment_id: str) -> str:
        from mlflow.entities import ViewType

        uid = create["uid"]
        found = self._client.search_runs([experiment_id], f"tags.`{RUN_UID_TAG}` = '{uid}'", ViewType.ALL)
        if found:
            return found[0].info.run_id
        tags = {RUN_UID_TAG: uid}
        with suppress(KeyError, OSError):  # the user of a container may have no name
            tags["mlflow.user"] = getpass.getuser()
        if create["parent_run_id"]:
            tags["mlflow.parentRunId"] = create["parent_run_id"]
        run = self._client.create_run(experiment_id, start_time=create["time"], tags=tags, run_name=create["run_name"])
        return run.info.run_id

    def _check_run(self, delivered: Delivered) -> None:
        from mlflow.exceptions import MlflowException

        try:
            stage = self._client.get_run(delivered.run_id).info.lifecycle_stage
        except MlflowException as error:
            if not self._refused(error):
                raise
            stage = "deleted"
        if stage != "active":
            raise RunGoneError(
                f"run {delivered.run_id} was deleted in MLflow; restore it (mlflow runs restore --run-id "
                f"{delivered.run_id}), or set another run name"
            )

    def _reason(self, error: Exception) -> str:
        """The cause where the server does not answer, else the first line of an error."""
        if (found := server_cause(error)) is not None:
            return found[0]
        text = (str(error) or type(error).__name__).splitlines()[0]
        return without_credentials(text, self._uri)[:300]


def _dataset_input(record: Record) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    fields = ("name", "digest", "source_type", "source", "schema", "profile")
    dataset = Dataset(**{field: record[field] for field in fields})
    return DatasetInput(dataset, [InputTag("mlflow.data.context", record["context"])])


class RunGoneError(Exception):
    """The run accepts no records any more; retrying does not help."""


class Sender(threading.Thread):
    """Delivers in the background, with exponential backoff while the server is unreachable."""

    def __init__(self, delivery: Delivery) -> None:
        super().__init__(name="spikefleet-tracking", daemon=True)
        self._delivery = delivery
        self._journal = delivery.journal
        self._change = threading.Condition()
        self._flushing = False  # a caller waits: pauses stay short
        self._hurry = False  # ends the current pause
        self._stopping = False
        self._gone = False

    def wake(self) -> None:
        """Tells the thread that records were appended."""
        with self._change:
            self._change.notify_all()

    def flush(self, wait_s: float) -> int:
        """Waits until all records are delivered, at most `wait_s` seconds; returns how many are not."""
        with self._change:
            self._flushing = self._hurry = True
            self._change.notify_all()
            self._change.wait_for(lambda: self._gone or not self._journal.pending, wait_s)
            self._flushing = False
            return self._journal.pending

    def stop(self) -> None:
        """Stops the thread, after its current request."""
        with self._change:
            self._stopping = True
            self._change.notify_all()
        self.join(timeout=1.0)

    def run(self) -> None:
        """Delivers records until `stop`."""
        pause = GATHER_S
        failing = False
        while self._wait(pause):
            try:
                while not self._stopping and self._delivery.attempt():
                    pass
                pause, failing = GATHER_S, False
            except Exception as error:
                self._gone = isinstance(error, RunGoneError)
                if not failing or self._gone:
                    log.warning(
                        "tracking at %s fails: %s; the run continues, and its records are kept in %s",
                        self._journal.delivered.tracking_uri,
                        self._delivery.problem,
                        self._journal.directory,
                    )
                pause, failing = GATHER_S if self._flushing else min(2 * pause, MAX_BACKOFF_S), True
            self.wake()
        self._journal.close()

    def _wait(self, pause: float) -> bool:
        """Waits for records and then `pause` seconds; False if the thread should end."""
        with self._change:
            self._change.wait_for(lambda: self._stopping or (self._journal.pending and not self._gone))
            self._change.wait_for(lambda: self._stopping or self._hurry, pause)
            self._hurry = False
            return not self._stopping


def next_batch(entries: list[Entry]) -> list[Entry]:
    """The longest prefix of records that fits into one request."""
    limits = {"metrics": MAX_METRICS, "params": MAX_PARAMS_OR_TAGS, "tags": MAX_PARAMS_OR_TAGS}
    counts = dict.fromkeys(limits, 0)
    for position, entry in enumerate(entries):
        kind = entry.record["kind"]
        if kind not in limits:
            return entries[: max(position, 1)]
        counts[kind] += len(entry.record["values"])
        if counts[kind] > limits[kind] or sum(counts.values()) > MAX_METRICS:
            return entries[:position]
    return entries
