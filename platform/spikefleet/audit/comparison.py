"""Two registered versions side by side: metrics, classes, configuration, and a test on the images that both saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikefleet.audit.paired_results import RESAMPLES, PairedResult, compare_paired, unpaired
from spikefleet.config.recipes import parse_model
from spikefleet.config.schema import differing_fields
from spikefleet.data_summary import DATA_SUMMARY, DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json_object
from spikefleet.registry.package import Card, read_config, verify_package
from spikefleet.registry.package_access import package_files
from spikefleet.status import Count, uncounted
from spikefleet.tasks.per_image import PER_IMAGE, PerImage
from spikefleet.tasks.task import EVALUATION

_CLASS_METRICS = ("top1", "ap50_95")
"""What an evaluation measures of each class, by task."""


@dataclass(frozen=True)
class Described:
    """What is known of one version."""

    reference: str
    task: str
    metrics: Mapping[str, float]
    """By split and name; energy_mj too."""
    properties: Mapping[str, float]
    """Parameters, timesteps, bound."""
    classes: Mapping[str, float | None]
    """Accuracy or average precision of each class, on the split that is reported."""
    class_metric: str
    """Its name; empty without classes."""
    config: Mapping[str, Any]
    data: DataSummary
    results: PerImage | None
    """None for a version without `evaluation.npz`."""


@dataclass(frozen=True)
class Comparison:
    """Two versions side by side."""

    first: Described
    second: Described
    paired: PairedResult | None
    unpaired: str | None
    """Why there is no test on the same images."""

    @property
    def same_data(self) -> bool:
        """Whether both were trained and measured on the same data."""
        return self.first.data.content_hash == self.second.data.content_hash

    @property
    def metrics(self) -> dict[str, tuple[float | None, float | None]]:
        """Metrics and properties that either has, with both values."""
        return {
            **_paired(self.first.metrics, self.second.metrics),
            **_paired(self.first.properties, self.second.properties),
        }

    @property
    def classes(self) -> dict[str, tuple[float | None, float | None]]:
        """Classes that both have, with both values; the largest differences first."""
        if self.first.class_metric != self.second.class_metric:
            return {}
        found = {
            name: (value, self.second.classes[name])
            for name, value in self.first.classes.items()
            if name in self.second.classes
        }
        return dict(sorted(found.items(), key=lambda item: -abs(_difference(*item[1]) or 0.0)))

    @property
    def config(self) -> dict[str, tuple[Any, Any]]:
        """Fields of the configurations that differ, of those that affect the result."""
        return differing_fields(self.first.config, self.second.config)

    @property
    def conclusion(self) -> str:
        """What can be said, in words."""
        if self.paired is not None:
            return self.paired.says
        remark = "" if self.same_data else "; their metrics are of different data, and a difference says little"
        return f"not compared image by image: {self.unpaired}{remark}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "first": self.first.reference,
            "second": self.second.reference,
            "same_data": self.same_data,
            "metrics": {name: _plain(*pair) for name, pair in self.metrics.items()},
            "class_metric": self.first.class_metric if self.classes else None,
            "classes": {name: _plain(*pair) for name, pair in self.classes.items()},
            "config": {path: {"first": pair[0], "second": pair[1]} for path, pair in self.config.items()},
            "paired": None if self.paired is None else self.paired.to_dict(),
            "unpaired": self.unpaired,
            "conclusion": self.conclusion,
        }


def compare(
    first: str | Path,
    second: str | Path,
    *,
    resamples: int = RESAMPLES,
    tracking_uri: str | None = None,
    progress: Count = uncounted,
) -> Comparison:
    """Compares two versions; every file that is read is verified against its hash.

    Args:
        first: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, or a pulled directory.
        second: likewise.
        resamples: of the paired bootstrap, for detectors.
        tracking_uri: of the registry; by default MLFLOW_TRACKING_URI, else SQLite in ./runs.
        progress: called with (resamples done, in all).

    Raises:
        UserError: a version does not exist, its files have changed, or the two solve different tasks.
    """
    left, right = (_described(reference, tracking_uri) for reference in (first, second))
    if left.task != right.task:
        raise UserError(
            f"{left.reference} is for {left.task} and {right.reference} for {right.task}; compare versions of one task"
        )
    lacking = [one.reference for one in (left, right) if one.results is None]
    if left.results is None or right.results is None:
        without = " and ".join(dict.fromkeys(lacking))
        why = f"{without} came without results by image ({PER_IMAGE}), as versions of earlier releases do"
        return Comparison(left, right, None, why)
    if (reason := unpaired(left.results, right.results)) is not None:
        return Comparison(left, right, None, reason)
    return Comparison(left, right, compare_paired(left.results, right.results, left.data, resamples, progress), None)


def _described(reference: str | Path, tracking_uri: str | None) -> Described:
    with package_files(reference, tracking_uri) as (package, content_hash):
        card = verify_package(package, content_hash)
        try:
            return _read(str(reference), package, card)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{reference} is damaged: its files are not those of a network ({error!r})") from None


def _read(reference: str, package: Path, card: Card) -> Described:
    config = read_config(package)
    model = parse_model(config["model"], reference)
    evaluation = read_json_object(package / EVALUATION) if EVALUATION in card.sha256 else {}
    rows = evaluation.get("classes") or []
    metric = next((name for name in _CLASS_METRICS if rows and name in rows[0]), "")
    parameters = sum(parameter.numel() for parameter in model.build().parameters())
    tags = {
        name: float(value)
        for name, value in model.tags().items()
        if name in ("timesteps", "bound") and isinstance(value, int | float)
    }
    return Described(
        reference,
        str(config["task"]),
        {str(name): float(value) for name, value in card.metadata.get("metrics", {}).items()},
        {**tags, "parameters": float(parameters)},
        {str(row["name"]): row[metric] for row in rows} if metric else {},
        metric,
        config,
        DataSummary.read(package) if DATA_SUMMARY in card.sha256 else DataSummary("", "", ()),
        PerImage.read(package / PER_IMAGE) if PER_IMAGE in card.sha256 else None,
    )


def _paired(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, tuple[float | None, float | None]]:
    return {name: (first.get(name), second.get(name)) for name in sorted({*first, *second})}


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else second - first


def _plain(first: float | None, second: float | None) -> dict[str, float | None]:
    return {"first": first, "second": second, "difference": _difference(first, second)}
