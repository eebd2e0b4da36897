"""The images on which candidate and champion are compared: nobody trained on them, chose by them, or quotes them.

Of a store of events they are recordings, or label times of recordings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from spikefleet.config.retrain_config import RetrainConfig
from spikefleet.data_access import store_at
from spikefleet.data_summary import DataSummary
from spikefleet.errors import UserError
from spikefleet.status import Announce, silent
from spikefleet_pipelines.errors import StoreError
from spikefleet_pipelines.store.reader import Samples, Store
from spikefleet_pipelines.store.splitting import sample_digests
from spikefleet_tune.messages import counted, one_of

MAKE_ONE = (
    "`spikefleet data split STORE --gate 0.1 --seed 0` makes one of training images; set retrain.gate_store to it, and "
    "data.store too, so that nobody trains on its gate images"
)
"""How to come by a gate store."""

_KNOWN_SHARE = 0.01
"""Gate images that are also in the training or the test data: up to this share they are data sets' usual doubles."""


@dataclass(frozen=True)
class GateStore:
    """The split with the gate images, and what speaks against its use, in words."""

    split: Samples
    content_hash: str
    """Of its store."""
    warnings: tuple[str, ...] = ()


def open_gate_store(settings: RetrainConfig, stores_dir: Path) -> GateStore:
    """Opens the gate store of a configuration, and verifies it.

    Args:
        settings: with a `gate_store`.
        stores_dir: directory of prepared stores.

    Raises:
        UserError: there is no store, or it is damaged; it has no such split, or that is a second name of another split.
    """
    assert settings.gate_store is not None, "the caller asks for one"
    place = store_at(settings.gate_store, stores_dir)
    if "://" not in place and not (Path(place) / "manifest.json").is_file():
        raise UserError(
            f"retrain.gate_store={settings.gate_store} is neither the path of a store nor a name in {stores_dir}; "
            f"{MAKE_ONE}"
        )
    try:
        store = Store.open(place)
    except StoreError as error:
        raise UserError(f"retrain.gate_store={settings.gate_store}: {error}") from error
    name, there = settings.gate_split, store.manifest.splits
    if name not in there:
        raise UserError(
            f"retrain.gate_store={settings.gate_store} has no split {name!r}; {one_of(there)} (retrain.gate_split), or "
            f"make one: {MAKE_ONE}"
        )
    if (other := store.manifest.original(name)) != name:
        raise UserError(
            f"retrain.gate_store={settings.gate_store}: its split {name!r} has the images of {other!r}; {MAKE_ONE}"
        )
    return GateStore(store.samples(name), store.manifest.content_hash)


def check_gate_store(gate: GateStore, data: DataSummary, used: Store | None, announce: Announce = silent) -> GateStore:
    """Checks a gate store against the data that a candidate was trained, chosen and tested with.

    Args:
        gate: the gate store.
        data: summary of the candidate's data.
        used: the store with these data; None if it is not there.
        announce: called with what begins.

    Returns:
        The gate store, with warnings.

    Raises:
        UserError: its classes or its camera are others, or it has images of the training, validation or test data.
    """
    names = gate.split.class_names
    if names != data.class_names:
        raise UserError(
            f"retrain.gate_store has the classes {', '.join(names[:5])}, ..., expected those of the training data, "
            f"{', '.join(data.class_names[:5])}, ...; set a store with the same classes"
        )
    _check_camera(gate.split, data)
    if used is None:
        warning = "the training data are not there, so nothing shows that the gate images are none of them"
        return GateStore(gate.split, gate.content_hash, (*gate.warnings, warning))
    same_store = used.manifest.content_hash == gate.content_hash
    own_split = gate.split.name not in ("train", "val", "test")
    if same_store and own_split and not used.manifest.audit.cross_split_duplicates:
        return gate
    announce("comparing the gate images with the training data")
    own = set(sample_digests(gate.split))
    warnings = list(gate.warnings)
    for name in ("train", "val", "test"):
        if name not in used.manifest.splits or used.manifest.original(name) != name:
            continue
        known = _known(own, sample_digests(used.samples(name)))
        if known > _KNOWN_SHARE * len(own):
            raise UserError(
                f"retrain.gate_store: {known:,} of its {len(own):,} different images are also in the split {name!r} of "
                f"{used.location}, but gate images must be in no other split; {MAKE_ONE}"
            )
        if known:
            warnings.append(f"{counted(known, 'gate image')} of {len(own):,} also in the split {name!r}")
    return GateStore(gate.split, gate.content_hash, tuple(warnings))


def _check_camera(split: Samples, data: DataSummary) -> None:
    """Raises UserError unless gate and training data are of one kind: images, or events of one sensor, read alike."""
    events = split.manifest.events
    found = None if events is None else (events.sensor, events.orientation)
    expected = None if data.sensor is None else (data.sensor, data.orientation)
    if found != expected:
        raise UserError(
            f"retrain.gate_store has {_camera(found)}, expected {_camera(expected)}, as the training data; make one of "
            f"them: {MAKE_ONE}"
        )


def _camera(camera: tuple[tuple[int, int], str] | None) -> str:
    if camera is None:
        return "images"
    (height, width), orientation = camera
    return f"events of {width}x{height} pixels read as {orientation}"


def _known(own: set[bytes], others: Iterable[bytes]) -> int:
    return len(own & set(others))
