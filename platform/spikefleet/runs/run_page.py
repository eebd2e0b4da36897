"""What MLflow's pages say about a run: its experiment, its data set, and its description in words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.tracking.mlflow_pages import RunListView, experiment_page, model_version_link, without_link_targets
from spikefleet.tracking.tracker import TrackedDataset
from spikefleet_models.family import ModelConfig
from spikefleet_pipelines.store.manifest import Manifest
from spikefleet_tune.messages import counted

_HASH = 12  # digits of a content hash, as everywhere in messages


@dataclass(frozen=True)
class Results:
    """The results of a finished run, for its description.

    Attributes:
        metrics: by split and name, such as "val/top1".
        epoch: of the best checkpoint; None where nothing was selected.
        energy_mj: for one image.
        verdict: of the spike check.
    """

    metrics: Mapping[str, float]
    epoch: int | None
    energy_mj: float
    verdict: str


def shown_params(model: ModelConfig) -> dict[str, object]:
    """Parameters under the short names of the field: time steps T and, of a spiking network, the integer bound D."""
    steps: dict[str, object] = {"T": model.simulated_timesteps}
    return {**steps, "D": model.tags().get("bound", 1)} if model.is_spiking else steps


def source_tags(command: str, code: str) -> dict[str, str]:
    """MLflow's tags of what was run: the command and, in a checkout, the commit."""
    commit = re.fullmatch(r"([0-9a-f]{12})(\+dirty)?", code)
    tags = {"mlflow.source.name": command, "mlflow.source.type": "LOCAL"}
    return {**tags, "mlflow.source.git.commit": commit[1]} if commit else tags


def training_experiment(config: Config) -> dict[str, str]:
    """Tags of the experiment that holds the trainings of a recipe."""
    metric = config.checkpoint.metric
    metrics = (f"best/val/{metric}", f"test/{metric}", "energy_mj")
    # Without the filter, MLflow folds trainings under their retraining.
    only = "" if "'" in config.recipe else f"tags.recipe = '{config.recipe}'"
    words = "Trainings with metric, energy, T, D and data set"
    view = RunListView(f"Results of {config.recipe}: {metric}", words, metrics, ("T", "D"), only=only)
    return experiment_page(f"Trainings of recipe {config.recipe}.", view)


def dataset_of(data: DataSummary, location: str, splits: Mapping[str, int] | None = None) -> TrackedDataset:
    """The data of a run as MLflow shows them.

    Args:
        data: their summary.
        location: path or address of the store.
        splits: number of images of each split.
    """
    if data.sensor is None:
        name, of_type, shape = "image", "uint8", [-1, *(data.image_shape or (-1, -1, -1))]
    else:
        name, of_type, shape = "events", "uint32", [-1]
    row = {"name": name, "type": "tensor", "tensor-spec": {"dtype": of_type, "shape": shape}}
    rows = {} if splits is None else {"num_rows": sum(splits.values()), **splits}
    return TrackedDataset(
        name=data.dataset,
        digest=data.content_hash[:_HASH],
        source=json.dumps({"uri": location}),
        schema=json.dumps({"mlflow_tensorspec": {"features": [row], "targets": None}}),
        profile=json.dumps({**rows, "classes": len(data.class_names), "content_hash": data.content_hash}),
    )


def split_sizes(manifest: Manifest) -> dict[str, int]:
    """The number of images of each split that is no alias of another one."""
    return {split: rows for split, rows in manifest.splits.items() if manifest.original(split) == split}


def run_description(config: Config, data: DataSummary, results: Results | None = None, registered: str = "") -> str:
    """The description of a training; its first line is the same before and after it.

    Args:
        config: of the run.
        data: its data.
        results: of a finished run.
        registered: what became of its best checkpoint in the registry, in Markdown.
    """
    shown = ", ".join(f"{name} = {value}" for name, value in shown_params(config.model).items())
    lines = [f"Training of recipe {config.recipe} on data set {data.dataset}, {shown}.", ""]
    if results is not None:
        lines += [_summary(config.checkpoint.metric, results), ""]
    if registered:
        lines += [registered, ""]
    lines.extend(_setting(config, data))
    if results is not None:
        lines.append(f"* The network {_which(results)}; spike-driven inference is {results.verdict}.")
        lines.append("* Artifacts: `report/` has plots; `layers.json` and `layer_energy.json` are tables by layer.")
        lines.extend(_table(results))
    return "\n".join(lines) + "\n"


def _setting(config: Config, data: DataSummary) -> Iterator[str]:
    plain = ("task", "timesteps", "bound")
    words = [f"{key} {value}" for key, value in config.model.tags().items() if key not in plain]
    yield f"* Network: {', '.join(words)}."
    yield f"* Data: {counted(len(data.class_names), 'class', 'classes')}, content `{data.content_hash[:_HASH]}`."
    train = config.train
    yield f"* Training: {counted(train.epochs, 'epoch')}, global batch {train.global_batch}, seed {train.seed}."


def _summary(metric: str, results: Results) -> str:
    found = [
        f"{name} {_shown(results.metrics[name])}"
        for name in (f"val/{metric}", f"test/{metric}")
        if name in results.metrics
    ]
    return f"**{', '.join([*found, f'{results.energy_mj:.4g} mJ for an image'])}**"


def _which(results: Results) -> str:
    return "of the last epoch" if results.epoch is None else f"of epoch {results.epoch}, the best on val"


def _table(results: Results) -> Iterator[str]:
    found = [name.partition("/") for name in results.metrics]
    splits, names = (list(dict.fromkeys(one[place] for one in found)) for place in (0, 2))
    if not names:
        return
    yield ""
    yield f"| metric | {' | '.join(splits)} |"
    yield f"|---|{'---|' * len(splits)}"
    for name in names:
        cells = [_shown(results.metrics.get(f"{split}/{name}")) for split in splits]
        yield f"| {name} | {' | '.join(cells)} |"


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2%}" if 0 <= value <= 1 else f"{value:.4g}"


def registration_sentence(name: str, version: int, alias: str | None, reason: str) -> str:
    """What became of a run's best checkpoint in the registry, in Markdown."""
    rank = f"became {alias}" if alias else "got no alias"
    return f"{model_version_link(name, version)} {rank}: {without_link_targets(reason)}."
