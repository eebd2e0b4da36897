"""Measures what a network's data is like: classes, images, objects, and spikes, energy and calibration on it.

Classes and objects are counted over all images of a split. Brightness, contrast and size are those of a sample of its
images; what the network does is measured on a part of that sample. Samples are a pure function of the seed and the
number of images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spikefleet.certificates.drift_reference import (
    Calibration,
    Distribution,
    DriftReference,
    LayerRate,
    NetworkReference,
    Spread,
)
from spikefleet.certificates.energy_card import REGISTERED_CONSTANTS
from spikefleet.config.schema import Config
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.status import Count, uncounted
from spikefleet.tasks import AnyTask, build_task
from spikefleet.training.evaluation import ChosenPlan
from spikefleet.training.precision import autocast
from spikefleet_models.energy import energy_card
from spikefleet_models.neurons import spiking_nodes
from spikefleet_models.reparam import deploy
from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.loading import BatchLoader
from spikefleet_pipelines.store.annotations import AnnotationColumns
from spikefleet_pipelines.store.reader import Samples, Store
from spikefleet_tune.messages import counted


def reference_of(
    store: Store,
    split: str = "train",
    network: nn.Module | None = None,
    config: Config | None = None,
    *,
    images: int = 1_000,
    network_images: int = 128,
    energy_images: int = 32,
    seed: int = 0,
    progress: Count = uncounted,
) -> DriftReference:
    """Measures a split of a store, and a network on it.

    Args:
        store: the data.
        split: name of the split.
        network: a trained network, on any device; not changed. None: the data alone is measured.
        config: configuration that the network was trained with: preprocessing, task and precision.
        images: decode at most this many, for brightness, contrast and sizes.
        network_images: run the network on at most this many of them, for firing rates and calibration.
        energy_images: measure the energy on at most this many of them.
        seed: of the sample.
        progress: called with (images done, images to do); an image that the network sees too counts again.

    Raises:
        StoreError: the store has no such split, or an image cannot be read.
    """
    manifest = store.manifest
    rows = store.samples(manifest.original(split))
    order = np.random.default_rng(seed).permutation(len(rows))
    decoded = np.sort(order[:images])
    seen, counted_energy = (np.sort(order[:number]) for number in (network_images, energy_images))
    count = _Progress(progress, len(decoded) + (0 if network is None else len(seen) + len(counted_energy)))
    measured: NetworkReference | None = None
    notes: list[str] = []
    distributions = dict(_of_images(rows, decoded, count))
    if rows.is_detection:
        distributions |= _of_objects(rows)
    if network is not None:
        assert config is not None, "a network is applied as its configuration says"
        refusal = _refusal(config, store)
        if refusal is None:
            measured, notes = _of_network(network, config, store, rows, seen, counted_energy, count)
        else:
            notes = [f"firing rates, energy and calibration cannot be measured on {manifest.name}: {refusal}"]
    return DriftReference(
        dataset=manifest.name or manifest.source,
        content_hash=manifest.content_hash,
        class_names=manifest.class_names,
        image_shape=manifest.image_shape,
        split=rows.name,
        images=len(rows),
        sampled=len(decoded),
        seed=seed,
        class_counts=_class_counts(store, rows),
        distributions=distributions,
        network=measured,
        notes=tuple(notes),
    )


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over names, types and values of a network's state."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Progress:
    """Counts images over several passes."""

    def __init__(self, progress: Count, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, images: int) -> None:
        self._done += images
        self._progress(self._done, self._total)


def _class_counts(store: Store, split: Samples) -> tuple[int, ...]:
    audit = store.manifest.audit
    if not split.is_detection:
        return tuple(audit.images_per_class[split.name])
    assert audit.boxes is not None, "the manifest of a detection store has them"
    return tuple(audit.boxes[split.name].objects_per_class)


def _of_images(split: Samples, rows: NDArray[np.int64], count: _Progress) -> Iterator[tuple[str, Distribution]]:
    """Brightness, contrast and size of images."""
    values = np.empty((len(rows), 4))
    for position, row in enumerate(rows):
        pixels = split.image(int(row)).numpy() / 255.0
        grey = pixels.mean(axis=0)
        values[position] = pixels.mean(), grey.std(), pixels.shape[2], pixels.shape[1]
        count(1)
    if len(rows):
        for column, name in enumerate(("brightness", "contrast", "image width", "image height")):
            yield name, Distribution.of(name, values[:, column])


def _of_objects(split: Samples) -> dict[str, Distribution]:
    """Number and areas of the objects of all images, without crowds."""
    columns = AnnotationColumns.joined(split.annotation_columns)
    image = columns.image_of_objects()[~columns.crowd]
    areas = columns.areas[~columns.crowd] / (columns.heights[image].astype(np.float64) * columns.widths[image])
    numbers = np.bincount(image, minlength=len(columns)).astype(np.float64)
    found = {"objects per image": numbers, "object area": areas}
    return {name: Distribution.of(name, values) for name, values in found.items() if len(values)}


def _refusal(config: Config, store: Store) -> str | None:
    """Why a network cannot run on the images of a store; None if it can."""
    manifest, events = store.manifest, store.manifest.events
    shape = config.data.transform.input_shape(manifest.image_shape, None if events is None else events.sensor)
    channels = shape[0] if shape else 3
    if channels != config.model.in_channels:
        return f"it takes {counted(config.model.in_channels, 'channel')}, and the images have {channels}"
    return None


def _of_network(
    network: nn.Module,
    config: Config,
    store: Store,
    split: Samples,
    rows: NDArray[np.int64],
    energy_rows: NDArray[np.int64],
    count: _Progress,
) -> tuple[NetworkReference | None, list[str]]:
    notes: list[str] = []
    task: AnyTask | None = None
    try:
        loader = BatchLoader(split, config.transform, train=False)
    except ValueError as error:
        return None, [f"firing rates, energy and calibration cannot be measured: {error}"]
    try:
        task = build_task(config, DataSummary.of(store.manifest))
    except UserError as error:
        notes.append(f"the calibration cannot be measured: {error}")
    was_training = network.training
    network.eval()
    layers, answers = _run(network, config, task, loader, rows, count)
    if task is not None and not answers:
        notes.append(f"the calibration cannot be measured on {store.manifest.name}: no answer has a confidence")
    try:
        energy = Spread.of(list(_energies(network, loader, energy_rows, count, config.transform.binary_input)))
    except StoreError:
        raise
    except ValueError as error:
        energy = None
        notes.append(f"the energy cannot be measured: {error}")
    network.train(was_training)
    measured = NetworkReference(
        weights=weights_digest(network),
        images=len(rows),
        layers=layers,
        energy=energy,
        energy_images=len(energy_rows) if energy else 0,
        calibration=Calibration.of(answers) if answers else None,
    )
    return measured, notes


@torch.no_grad()
def _run(
    network: nn.Module,
    config: Config,
    task: AnyTask | None,
    loader: BatchLoader,
    rows: NDArray[np.int64],
    count: _Progress,
) -> tuple[tuple[LayerRate, ...], list[tuple[float, bool]]]:
    """Firing rate of each layer over images, and (confidence, right) of each answer."""
    # Images of varying sizes run one at a time: a batch would pad them to the largest.
    size = config.train.eval_batch if loader.split.image_shape else 1
    device = next(network.parameters()).device
    rates: dict[str, list[NDArray[np.float64]]] = {}
    predictions: list[Any] = []
    targets: list[Any] = []
    for start in range(0, len(rows), size):
        part = tuple(rows[start : start + size].tolist())
        (batch,) = loader.epoch(ChosenPlan(len(loader.split), part), epoch=0)
        here = batch.to(device, config.train.channels_last)
        with autocast(config.train.precision, device), _rates_by_image(network) as seen:
            if task is None:
                network(here.network_input)
            else:
                predictions += task.predict(network, here)
                targets += task.targets(batch)
        for name, calls in seen.items():
            rates.setdefault(name, []).append(torch.stack(calls).mean(0).double().cpu().numpy())
        count(len(part))
    layers = tuple(LayerRate(layer=name, rate=Spread.of(np.concatenate(parts))) for name, parts in rates.items())
    return layers, [] if task is None or not predictions else task.confidences(predictions, targets)


@contextmanager
def _rates_by_image(network: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Firing rates [B] of each call of each spiking layer, as fractions of the most that it can emit."""
    seen: dict[str, list[torch.Tensor]] = {}

    def recorder(name: str, bound: int) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], None]:
        def record(node: nn.Module, inputs: tuple[Any, ...], spikes: torch.Tensor) -> None:  # [T, B, ...]
            rates = spikes.detach().float().transpose(0, 1).flatten(1).mean(1) / bound
            seen.setdefault(name, []).append(rates)

        return record

    with ExitStack() as stack:
        for name, node in spiking_nodes(network).items():
            stack.callback(node.register_forward_hook(recorder(name, node.bound)).remove)
        yield seen


def _energies(
    network: nn.Module, loader: BatchLoader, rows: NDArray[np.int64], count: _Progress, binary_input: bool
) -> Iterator[float]:
    """The energy of each image in mJ, counted as in energy cards of registered versions."""
    device, deployed = next(network.parameters()).device, network
    for row in rows.tolist():
        (batch,) = loader.epoch(ChosenPlan(len(loader.split), (row,)), epoch=0)
        card = energy_card(
            deployed,
            [batch.network_input.to(device)],
            REGISTERED_CONSTANTS,
            twin_form=None,
            binary_input=binary_input,
        )
        if card.form == "merged":
            deployed = deploy(network)  # which counts the same, and need not be done for each image
        count(1)
        yield card.energy_mj
