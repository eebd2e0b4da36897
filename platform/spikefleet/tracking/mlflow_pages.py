"""What MLflow's pages show by its own tags: kind of an experiment, views of its run list, descriptions, tables.

The names are those of MLflow's JavaScript, which documents none of them; a page that does not know one ignores it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

NOTE: Final = "mlflow.note.content"
"""Tag with the description of a run or an experiment, as Markdown."""

KIND: Final = "mlflow.experimentKind"
"""Tag of an experiment: which of MLflow's pages it opens in."""

MODEL_TRAINING: Final = "custom_model_development"
"""The kind of an experiment with runs and models, instead of traces and prompts."""

TRAINING_PAGES: Final = "workflowType=machine_learning"
"""Query of an address that opens in the pages for model training; MLflow 3.17 looks at it and at no tag."""

TABLES: Final = "mlflow.loggedArtifacts"
"""Tag of a run: its artifacts that are shown as tables."""

EXPERIMENT_ID: Final = "{experiment_id}"
"""Stands for the id in the tags of an experiment, which has none before it is created."""

_VIEW = "mlflow.sharedViewState."
_VIEW_TIME_MS = 1_767_225_600_000  # a constant, so that a view that is stored again is the same text
_RUN_NAME, _DATASET, _MODELS = 150, 250, 180  # widths in pixels


@dataclass(frozen=True)
class RunListView:
    """A named view of an experiment's run list: the columns that it shows beside name and time of a run.

    Attributes:
        name: in MLflow's menu of views.
        link_text: of the link to it.
        metrics: names of metrics.
        params: names of parameters.
        only: MLflow's filter for the runs to show; empty for all.
        order_by: name of the metric by which runs are sorted; None is by time, the newest first.
        ascending: whether the smallest metric comes first.
    """

    name: str
    link_text: str
    metrics: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    only: str = ""
    order_by: str | None = None
    ascending: bool = False

    @property
    def key(self) -> str:
        """Identifies the view in its experiment and in addresses."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]

    @property
    def tag(self) -> tuple[str, str]:
        """The tag of an experiment that holds the view, with its value."""
        widths = {f"metrics.`{name}`": _width(name) for name in self.metrics}
        widths |= {f"params.`{name}`": _width(name) for name in self.params}
        widths |= {"attributes.`Dataset`": _DATASET, "attributes.`Models`": _MODELS}
        columns = list(widths)
        state = {
            "searchFilter": self.only,
            "orderByKey": "attributes.start_time" if self.order_by is None else f"metrics.`{self.order_by}`",
            "orderByAsc": self.ascending,
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": columns,
            "columnOrder": ["attributes.`Run Name`", *columns],
            "columnWidths": {"attributes.`Run Name`": _RUN_NAME, **widths},
        }
        envelope = {"name": self.name, "createdAt": _VIEW_TIME_MS, "state": json.dumps(state)}
        return f"{_VIEW}{self.key}", json.dumps(envelope)

    @property
    def link(self) -> str:
        """A Markdown link to the run list in this view, for a tag of its experiment."""
        address = f"#/experiments/{EXPERIMENT_ID}/runs?{TRAINING_PAGES}&viewStateShareKey={self.key}"
        return f"[{self.link_text}]({address})"


def _width(name: str) -> int:
    return 44 if len(name) < 3 else max(100, min(190, 9 * len(name)))


def experiment_page(description: str, view: RunListView) -> dict[str, str]:
    """Tags of an experiment: its kind, its description with a link to a view of its runs, and the view."""
    return {KIND: MODEL_TRAINING, NOTE: f"{description} {view.link}", **dict((view.tag,))}


def table_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same columns as the JSON of MLflow's tables."""
    columns = list(rows[0]) if rows else []
    return json.dumps({"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]})


def tables_tag(artifacts: Sequence[str]) -> str:
    """The value of `TABLES` that shows these artifacts as tables."""
    return json.dumps([{"path": path, "type": "table"} for path in artifacts])


def model_version_link(name: str, version: int) -> str:
    """A Markdown link to the page of a registered version."""
    return f"[{name} version {version}](#/models/{name}/versions/{version}?{TRAINING_PAGES})"


def artifact_link(text: str, experiment_id: str, run_id: str, path: str) -> str:
    """A Markdown link to an artifact of a run, as MLflow shows it."""
    return f"[{text}](#/experiments/{experiment_id}/runs/{run_id}/artifacts/{path})"


def without_link_targets(text: str) -> str:
    """A text in which Markdown finds no link and no HTML, for words that others wrote."""
    return text.replace("<", "&lt;").replace("[", "\\[")
