"""The index of the registry: what can be asked of a version, on its LoggedModel, where MLflow searches by SQL.

MLflow compares the tags of versions only as text, and reading the versions costs a millisecond each. A LoggedModel has
metrics, which MLflow compares and sorts as numbers. So each version's numbers are logged as metrics and its words as
tags of the LoggedModel that it was made from; the tags of the version stay what is true, and the index only proposes.

A version is indexed when it has the tag `INDEXED`, which is set last. Its value is the number of versions then: with it
`is_complete` compares the number of versions with the number of indexed ones in a few queries, whatever their number.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spikefleet.registry.version import CONTENT_HASH, PARAMS_M, T_X_D, RegisteredVersion
from spikefleet_tune.expressions import spelled_number

if TYPE_CHECKING:
    from mlflow import MlflowClient

INDEXED: Final = "spikefleet.indexed"
"""Tag of an indexed version."""

VERSION: Final = "spikefleet.version"
"""Tag of a LoggedModel: the version that it belongs to, as NAME/7."""

EXPERIMENT: Final = "spikefleet"
"""Tag, with the value "1", of the experiments that hold LoggedModels of versions."""

LONGEST_WORD: Final = 250
"""Longer texts are not indexed, and not searched for in the index."""

FIXED: Final = frozenset(
    {
        *("task", "dataset", "data_hash", "recipe", "family", "connection", "decoder", "neuron", "activation"),
        *("timesteps", "bound", "parameters", "size_mb", "spike_driven", "metric", "seed", "run_name", "code_version"),
        *("proof_deployed", "proof_binary", "proof_metric", "proof_alone", PARAMS_M, T_X_D),
    }
)
"""Tags that registration sets, and what follows from them: others may be set later, and are not in the index."""

_OURS = f"tags.`{CONTENT_HASH}` != ''"
_LISTED = f"{_OURS} AND tags.`{INDEXED}` != ''"
MODEL_ID: Final = re.compile(r"\bm-[0-9a-f]{32}\b")
"""Id of a LoggedModel."""


@dataclass(frozen=True)
class Entry:
    """What the index says of one version."""

    words: Mapping[str, str]
    numbers: Mapping[str, float]


def entry_of(version: RegisteredVersion) -> Entry | None:
    """What the index must say of a version; None where a tag and a metric of one name are different numbers."""
    words, numbers = {}, {name: value for name, value in version.metrics.items() if not math.isnan(value)}
    for key, value in version.metadata().items():
        number = spelled_number(value) if isinstance(value, str) else value
        if key not in FIXED:
            continue  # metrics are in, and validation metrics by their full names
        if number is not None and math.isfinite(number):
            if numbers.setdefault(key, number) != number:
                return None
        elif isinstance(value, str) and len(value) <= LONGEST_WORD:
            words[key] = value
    return Entry(words, numbers)


def model_id_of(source: str) -> str | None:
    """Id of the LoggedModel in the source of a version."""
    found = MODEL_ID.search(source)
    return None if found is None else found[0]


def write_numbers(client: MlflowClient, model_id: str, run_id: str, numbers: Mapping[str, float]) -> None:
    """Logs numbers as metrics of a LoggedModel.

    MLflow logs them for the run as well: where the run has measured the same value, they get the time and the step of
    that measurement, so that its curve gets no further point. Raises MlflowException.
    """
    from mlflow.entities import Metric

    if not numbers:
        return
    known = {metric.key for metric in client.get_logged_model(model_id).metrics or ()}
    measured = client.get_run(run_id).data.metrics.keys() - known  # else the newest value must be this one
    now = int(time.time() * 1000)
    metrics = []
    for key, value in numbers.items():
        history = client.get_metric_history(run_id, key) if key in measured else ()
        when, step = next(((point.timestamp, point.step) for point in history if point.value == value), (now, 0))
        metrics.append(Metric(key, value, when, step, model_id=model_id))
    client.log_batch(run_id, metrics=metrics)


def mark_experiment(client: MlflowClient, experiment_id: str) -> None:
    """Marks an experiment as one to search. Raises MlflowException, for one that is deleted too."""
    if client.get_experiment(experiment_id).tags.get(EXPERIMENT) != "1":
        client.set_experiment_tag(experiment_id, EXPERIMENT, "1")


def mark(client: MlflowClient, version: RegisteredVersion, model_id: str, versions: int | None = None) -> str:
    """Marks a version as indexed, once its LoggedModel has all that can be asked.

    Args:
        client: of the registry.
        version: the version.
        model_id: of its LoggedModel.
        versions: how many the registry has; None if that must be asked.

    Returns:
        The value of the tag `INDEXED`.

    Raises:
        MlflowException: the registry fails.
    """
    client.set_logged_model_tags(model_id, {VERSION: f"{version.name}/{version.version}"})
    value = str(_count(client, _OURS, _hint(client)) if versions is None else versions)
    client.set_model_version_tag(version.name, str(version.version), INDEXED, value)
    return value


def is_complete(client: MlflowClient) -> bool:
    """Whether there are versions and all are indexed."""
    number = _count(client, _OURS, _hint(client))
    return number > 0 and _has(client, _LISTED, number)


def _hint(client: MlflowClient) -> int:
    """The number of versions when the newest indexed one was registered."""
    newest = client.search_model_versions(
        f"tags.`{INDEXED}` != ''", max_results=1, order_by=["creation_timestamp DESC"]
    )
    value = newest[0].tags[INDEXED] if newest else ""
    return int(value) if re.fullmatch(r"[0-9]{1,9}", value) else 0


def _count(client: MlflowClient, condition: str, hint: int) -> int:
    """The number of versions, searched for around a number that it is near."""
    low, step = hint, 1
    if low and not _has(client, condition, low):
        high = low
        while high > step and not _has(client, condition, high - step):
            high, step = high - step, 2 * step
        low = max(high - step, 0)
    else:
        while _has(client, condition, low + step):
            low, step = low + step, 2 * step
        high = low + step
    while high - low > 1:  # there are `low` versions at least, and fewer than `high`
        middle = (low + high) // 2
        low, high = (middle, high) if _has(client, condition, middle) else (low, middle)
    return low


def _has(client: MlflowClient, condition: str, number: int) -> bool:
    """Whether there are so many versions: a page that starts at the last of them is not empty."""
    from mlflow.utils.search_utils import SearchUtils

    token = SearchUtils.create_page_token(number - 1).decode() if number > 1 else None
    return bool(client.search_model_versions(condition, max_results=1, page_token=token))
