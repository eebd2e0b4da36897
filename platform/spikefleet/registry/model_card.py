"""The model card of a version as Markdown, from the hashed files of its package alone.

It is what `registry show --card` prints, and the description of the version on MLflow's page.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spikefleet.config.recipes import parse_model
from spikefleet.config.schema import leaves
from spikefleet.config.task_table import find_task
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.files import read_json_object
from spikefleet.registry import served_events
from spikefleet.registry.package import Card, read_config
from spikefleet.registry.served_input import EXPECTED
from spikefleet.registry.version import LATENCY_DEVICE, SPIKE_DRIVEN
from spikefleet.status import one_line
from spikefleet_tune.messages import counted

MOST_CHARACTERS = 4900
"""MLflow's database keeps 5,000 characters of a description."""

_NAMED_CLASSES = 40

EVALUATION = "evaluation.json"
ENERGY = "energy.json"  # both names as in `tasks` and `certificates`, which import torch
CARD_SOURCES = (EVALUATION, ENERGY)
"""Files of a package that a card reads where they are there, beside those that every package has."""

_RATES = ("top1", "top5")
"""Metrics that are shares of the images, each right or wrong."""

_Z = 1.959964  # of the standard normal distribution, for 95 %


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a probability by Wilson (1927), from the share of successes among independent trials.

    Args:
        share: in [0, 1].
        count: trials, at least 1.
    """
    shrunk = 1 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / shrunk
    half = _Z / shrunk * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def card_heading(name: str) -> str:
    """The first line of the card of a model of this name."""
    return f"# {one_line(name)}\n"


def model_card(title: str, package: Path, card: Card, flaw: str | None = None, status: Sequence[str] = ()) -> str:
    """The card of a version: use, data, metrics, energy, proof, configuration, lineage, limits.

    Args:
        title: name of the model, or reference of the version.
        package: directory of its verified package; the JSON files are read.
        card: of the package.
        flaw: why it must not be used, in words.
        status: what the registry says of the version, in sentences: its aliases, and since when and why.

    Raises:
        UserError: a file of the package is damaged.
    """
    try:
        lines = [card_heading(title).rstrip()]
        if flaw is not None:
            lines += ["", f"**Must not be used: {one_line(flaw)}.**"]
        if status:
            lines += ["", *(f"* {one_line(sentence)}." for sentence in status)]
        for heading, content in _sections(package, card.metadata).items():
            lines += ["", f"## {heading}", "", *content]
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{package} is damaged: its files are not those of a network ({error!r})") from None
    return "\n".join(lines) + "\n"


def _sections(package: Path, metadata: Mapping[str, Any]) -> dict[str, Iterator[str]]:
    config, data = read_config(package), DataSummary.read(package)
    tags = {str(key): str(value) for key, value in _mapping(metadata.get("tags")).items()}
    return {
        "Use": _use(config, data),
        "Data": _data(data, tags),
        "Metrics": _metrics(_mapping(metadata.get("metrics")), _read(package / EVALUATION)),
        "Energy": _energy(_mapping(metadata.get("metrics")), _read(package / ENERGY)),
        "Latency": _latency(_mapping(metadata.get("metrics")), tags),
        "Proof": _proof(tags),
        "Configuration": _configuration(config),
        "Lineage": _lineage(metadata, tags),
        "Limits": _limits(metadata),
    }


def description_of(name: str, package: Path, card: Card, flaw: str | None = None) -> str:
    """The card as a description for MLflow, whose database keeps 5,000 characters."""
    return fitted_description(model_card(name, package, card, flaw))


def fitted_description(text: str) -> str:
    """A description cut at a line to what MLflow's database keeps."""
    if len(text) <= MOST_CHARACTERS:
        return text
    rest = "\n\nMore: `spikefleet registry show --card`\n"
    return text[: MOST_CHARACTERS - len(rest)].rpartition("\n")[0] + rest


def _use(config: Mapping[str, Any], data: DataSummary) -> Iterator[str]:
    network = parse_model(config["model"], "the configuration of a registered model")
    size = f", {data.image_shape[1]} x {data.image_shape[2]} pixels" if data.image_shape else ", of several sizes"
    if data.sensor is None:
        yield f"* Task: {one_line(str(config['task']))}, for images like those of {one_line(data.dataset)}."
        yield f"* Expects {EXPECTED}. Channels: {network.in_channels}; trained on images{size} (height x width)."
    else:
        side = f"{data.sensor[0]} x {data.sensor[1]} pixels"
        yield f"* Task: {one_line(str(config['task']))}, for events like those of {one_line(data.dataset)}."
        yield f"* Expects {served_events.EXPECTED}. T: {network.simulated_timesteps}; C: {network.in_channels}."
        yield f"* Trained on recordings of a sensor of {side} (height x width)."
    yield f"* Answers {find_task(str(config['task'])).answers}; computed in fp32."
    names = ", ".join(map(one_line, data.class_names[:_NAMED_CLASSES]))
    more = len(data.class_names) - _NAMED_CLASSES
    yield f"* {counted(len(data.class_names), 'class', 'classes')}: {names}{f' and {more} more' if more > 0 else ''}."


def _data(data: DataSummary, tags: Mapping[str, str]) -> Iterator[str]:
    yield f"* Data set: {one_line(tags.get('dataset', data.dataset))}, prepared by source {one_line(data.source)}."
    yield f"* SHA-256 of the store: `{one_line(data.content_hash)}`."
    yield "* Licence: not recorded; that of the data set holds."


def _metrics(metrics: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Iterator[str]:
    split, counted_images = evaluation.get("split", "test"), evaluation.get("samples")  # once always that of test
    count = counted_images if isinstance(counted_images, int) else 0
    found = [(name.partition("/"), value) for name, value in sorted(metrics.items()) if "/" in name]
    if not found:
        yield "None was registered."
        return
    yield "| metric | split | value | images | 95 % interval |"
    yield "|---|---|---|---|---|"
    for (of, _, name), value in found:
        here = count > 0 and of == split and value == _mapping(evaluation.get("metrics")).get(name)
        bounds = wilson_interval(value, count) if here and name in _RATES and 0 <= value <= 1 else None
        interval = "-" if bounds is None else f"{bounds[0]:.2%} to {bounds[1]:.2%}"
        shown = f"{value:.2%}" if 0 <= value <= 1 else f"{value:.4g}"
        yield f"| {one_line(name)} | {one_line(of)} | {shown} | {count if here else '-'} | {interval} |"
    if any(name in _RATES for (_, _, name), _ in found):
        yield ""
        yield "Intervals by Wilson, over the images; another seed adds to them."
    else:
        yield ""
        yield "Average precision has no interval without resampled images."


def _energy(metrics: Mapping[str, Any], energy: Mapping[str, Any]) -> Iterator[str]:
    if (value := metrics.get("energy_mj")) is None:
        yield "Not measured."
        return
    constants = _mapping(energy.get("constants"))
    named = f" by the constants {one_line(str(constants['name']))}" if "name" in constants else ""
    yield f"* {float(value):.4g} mJ for an image{named}."
    if "source" in constants:
        yield f"* {one_line(str(constants['source']))}; estimated from counted operations, not measured on a chip."
    if {"timesteps", "bound", "images"} <= energy.keys():
        yield f"* T = {energy['timesteps']}, D = {energy['bound']}; rates of {energy['images']} images."


def _latency(metrics: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[str]:
    if (value := metrics.get("latency_ms")) is None:
        yield "Not measured."
        return
    yield f"* {float(value):.4g} ms for an image alone, in fp32 ({one_line(tags.get(LATENCY_DEVICE, '-'))})."
    yield "* It holds on that device with that number of threads; measure it again on yours."


def _proof(tags: Mapping[str, str]) -> Iterator[str]:
    yield f"* Spike-driven inference: {one_line(tags.get(SPIKE_DRIVEN, 'not checked'))}."
    yield from (f"* {one_line(value)}." for key, value in sorted(tags.items()) if key.startswith("proof_"))


def _configuration(config: Mapping[str, Any]) -> Iterator[str]:
    plain = [f"{key}={_plain(value)}" for key, value in leaves({"model": config["model"]})]
    yield f"`{one_line(', '.join(plain))}`"
    trained = [
        f"{key}={_plain(value)}"
        for key, value in leaves({name: _mapping(config.get(name)) for name in ("train", "optim")})
        if key in ("train.epochs", "train.global_batch", "train.precision", "train.seed", "optim.lr", "optim.schedule")
    ]
    if trained:
        yield ""
        yield f"`{one_line(', '.join(trained))}`"


def _lineage(metadata: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[str]:
    yield f"* MLflow run `{one_line(str(metadata.get('run_id', '-')))}`."
    for key in (
        "run_name",
        "recipe",
        "seed",
        "code_version",
        "init_from",
        "init_sha256",
        "init_scaled",
        "segments",
        "retraining",
        "parent",
    ):
        if key in tags:
            yield f"* {key}: {one_line(tags[key])}."


def _limits(metadata: Mapping[str, Any]) -> Iterator[str]:
    yield "* It knows these classes alone, and was tried on no other kind of images."
    splits = {name.partition("/")[0] for name in _mapping(metadata.get("metrics"))}
    if "val" in splits:
        instead = "; those on test are to be quoted" if "test" in splits else ""
        yield f"* The metrics on val chose the checkpoint and are optimistic{instead}."
    plugins = metadata.get("plugins")
    if isinstance(plugins, Sequence) and plugins:
        names = one_line(", ".join(map(str, plugins)))
        yield f"* Was trained with plugin {names}, whose code is not in the version: install it and spikefleet."


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _read(path: Path) -> Mapping[str, Any]:
    """A JSON file of the package; nothing where it has none."""
    return read_json_object(path) if path.is_file() else {}
