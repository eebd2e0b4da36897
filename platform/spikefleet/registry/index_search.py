"""Searching the index: LoggedModels in the order of a metric, and the versions of their runs.

The filter holds for every version that matches, and perhaps for others: the index proposes, the tags of the versions
decide. A run may have several versions: renewed ones, and copies under other names, which have no LoggedModel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from spikefleet.registry.lookup_index import EXPERIMENT, FIXED, VERSION, entry_of, is_complete
from spikefleet.registry.mlflow_store import versions_of_runs
from spikefleet.registry.query import Pushed, parse_where, plain_word, pushed_terms
from spikefleet.registry.question import TRUSTED, Question
from spikefleet.registry.version import SPIKE_DRIVEN, RegisteredVersion

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

_MARGIN = 20  # LoggedModels that are read beyond those that are asked for
_MOST_READ = 600  # to read more takes longer than to read all versions of a registry of usual size
_LEAST = -1.7976931348623157e308


class IndexUnusableError(Exception):
    """The index cannot answer; the message says why."""


def search_index(client: MlflowClient, question: Question) -> list[RegisteredVersion]:
    """Versions that match, without aliases: the best, all that are as good as the last of these, and perhaps others.

    Args:
        client: of the registry.
        question: what is asked.

    Raises:
        IndexUnusableError: all versions must be read.
        MlflowException: the registry fails.
    """
    if not is_complete(client):
        raise IndexUnusableError("some are not indexed; `spikefleet registry reindex` makes lookups fast")
    search = _Search(client, question)
    streams = [_Stream(search, name) for name in dict.fromkeys((question.metric, f"val/{question.metric}"))]
    size = question.top + _MARGIN
    while True:
        for stream in streams:
            stream.advance(size)
        sure = [v for v in search.matching() if all(stream.has_passed(v) for stream in streams)]
        if len(sure) >= question.top or all(stream.ended for stream in streams):
            break
        size *= 4
        if sum(stream.read for stream in streams) + size > _MOST_READ:
            raise IndexUnusableError("few of those that the index proposes satisfy the condition")
    if not sure:
        raise IndexUnusableError("the index has no version that answers")
    search.check_keys()
    return sure


class _Search:
    """A filter for the index, and the versions that it has proposed."""

    def __init__(self, client: MlflowClient, question: Question) -> None:
        self.client, self.question = client, question
        self.experiments = _experiments(client)
        self._query = None if question.where is None else parse_where(question.where)
        narrowed = (Pushed(key, "==", value) for key, value in question.narrowed().items() if plain_word(value))
        asked = [] if self._query is None else pushed_terms(self._query)
        terms = [*narrowed, *filter(None, map(self._located, asked))]
        trusted = ", ".join(f"'{verdict}'" for verdict in TRUSTED)
        proof = [] if question.any_proof else [f"tags.`{SPIKE_DRIVEN}` IN ({trusted})"]
        self.filter = " AND ".join([*(term.filter for term in terms), *proof])
        self._keys = {SPIKE_DRIVEN, question.metric, f"val/{question.metric}", *(term.key for term in terms)}
        self._versions: dict[tuple[str, int], RegisteredVersion] = {}
        self._runs: set[str] = set()

    def matching(self) -> list[RegisteredVersion]:
        """The proposed versions that match and have the metric."""
        return [
            version
            for version in filter(self.question.takes, self._versions.values())
            if self.question.value(version) is not None
            and (self._query is None or self._query.holds(version.metadata()))
        ]

    def check_keys(self) -> None:
        """Raises IndexUnusableError where a name of the condition may be none, or be a division or a difference."""
        if self._query is not None:
            known = {
                key for version in filter(self.question.takes, self._versions.values()) for key in version.metadata()
            }
            if unknown := [name for name in self._query.names if name not in known]:
                raise IndexUnusableError(f"none of those that the index proposes has the key {unknown[0]!r}")

    def add(self, models: Sequence[LoggedModel]) -> None:
        """Reads the versions of the runs of LoggedModels. Raises IndexUnusableError for one that was edited."""
        runs = {model.source_run_id for model in models if model.source_run_id} - self._runs
        self._runs |= runs
        for version in versions_of_runs(self.client, sorted(runs)):
            self._versions[version.name, version.version] = version
        for model in models:
            name, _, number = model.tags.get(VERSION, "").rpartition("/")
            indexed = self._versions.get((name, int(number))) if number.isdecimal() else None
            if indexed is not None and self._was_edited(indexed, model):
                raise IndexUnusableError(
                    f"{indexed.uri} was edited by hand; `spikefleet registry reindex` makes lookups fast"
                )

    def _located(self, term: Pushed) -> Pushed | None:
        """A term by the key that the index has for all versions; None if it has none, or if versions differ in it.

        A validation metric stands there by its full name.
        """
        if isinstance(term.value, str):
            return term if term.key in FIXED else None
        short, full = self._exists(f"val/{term.key}"), term.key in FIXED or self._exists(term.key)
        if short == full:
            return None
        return term if full else replace(term, key=f"val/{term.key}")

    def _exists(self, metric: str) -> bool:
        condition = Pushed(metric, ">=", _LEAST).filter
        return bool(self.client.search_logged_models(self.experiments, condition, max_results=1))

    def _was_edited(self, version: RegisteredVersion, model: LoggedModel) -> bool:
        """Whether the tags of a version differ from the index in something that is asked."""
        entry, numbers = entry_of(version), numbers_of(model)
        return entry is None or any(
            (key in entry.numbers and entry.numbers[key] != numbers.get(key))
            or (key in entry.words and entry.words[key] != model.tags.get(key))
            for key in self._keys
        )


class _Stream:
    """The proposed LoggedModels that have one metric, page by page, the best first."""

    def __init__(self, search: _Search, metric: str) -> None:
        self._search, self._metric = search, metric
        self._token: str | None = None
        self._last = 0.0
        self.read = 0
        self.ended = False

    def advance(self, size: int) -> None:
        """Reads one page, unless none is left."""
        if self.ended:
            return
        search = self._search
        order = {"field_name": f"metrics.{self._metric}", "ascending": search.question.mode == "min"}
        page = search.client.search_logged_models(
            search.experiments, search.filter, max_results=size, order_by=[order], page_token=self._token
        )
        measured = [model for model in page if self._metric in numbers_of(model)]  # those without it are the last
        self.read, self._token = self.read + len(page), page.token
        self.ended = self._token is None or len(measured) < len(page)
        if measured:
            self._last = numbers_of(measured[-1])[self._metric]
        search.add(measured)

    def has_passed(self, version: RegisteredVersion) -> bool:
        """Whether all versions that are as good as this one have been read."""
        question = self._search.question
        value = question.value(version)
        return self.ended or (value is not None and question.loss(value) < question.loss(self._last))


def numbers_of(model: LoggedModel) -> dict[str, float]:
    """The newest value of each metric of a LoggedModel."""
    values = sorted(model.metrics or (), key=lambda metric: (metric.timestamp, metric.step))
    return {metric.key: metric.value for metric in values}


def _experiments(client: MlflowClient) -> list[str]:
    """Ids of the experiments to search. Raises IndexUnusableError if there are none."""
    from mlflow.entities import ViewType

    found: list[str] = []
    token = None
    while True:  # also deleted experiments: their versions stay
        page = client.search_experiments(ViewType.ALL, filter_string=f"tags.{EXPERIMENT} = '1'", page_token=token)
        found += [experiment.experiment_id for experiment in page]
        if not (token := page.token):
            break
    if not found:
        raise IndexUnusableError("no experiment has the tag spikefleet; `spikefleet registry reindex` sets it")
    return found
