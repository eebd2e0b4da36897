"""Reads a recording with a library that is not ours; run by an interpreter that has the library, see `other_reader`.

    python independent_readers.py LIBRARY FORMAT FILE OUT.npz [LIBRARY FORMAT FILE OUT.npz ...]

It imports nothing of the project, so that any interpreter runs it.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np


def _expelliarmus(kind: str, path: str) -> Any:
    wizard = importlib.import_module("expelliarmus").Wizard(encoding=kind)
    return wizard.read(path)


def _faery(kind: str, path: str) -> Any:
    faery = importlib.import_module("faery")
    name, keys = {
        "dat": ("dat", {"dimensions_fallback": (128, 128), "version_fallback": "dat2"}),
        "evt2": ("evt", {"dimensions_fallback": (128, 128), "version_fallback": "evt2"}),
        "evt21": ("evt", {"dimensions_fallback": (128, 128), "version_fallback": "evt2.1"}),
        "evt3": ("evt", {"dimensions_fallback": (128, 128), "version_fallback": "evt3"}),
        "aedat4": ("aedat", {}),
    }[kind]
    with getattr(faery, name).Decoder(path, **keys) as decoder:
        packets = [packet["events"] if isinstance(packet, dict) else packet for packet in map(_last, decoder)]
    events = np.concatenate(packets)
    p = events["on" if "on" in (events.dtype.names or ()) else "payload"]
    return {"t": events["t"], "x": events["x"], "y": events["y"], "p": p}


def _last(packet: Any) -> Any:
    """Some decoders yield (track, packet)."""
    return packet[-1] if isinstance(packet, tuple) else packet


def _write_aedat4(source: str, path: str) -> Any:
    """Write the events of a .npz file, which is the format's name here, as AEDAT 4 by the vendor's library."""
    dv = importlib.import_module("dv_processing")
    events = dict(np.load(source))
    writer = dv.io.MonoCameraWriter(path, dv.io.MonoCameraWriter.EventOnlyConfig("made", (128, 128)))
    for start in range(0, len(events["t"]), 1000):
        store = dv.EventStore()
        columns = (events[name][start : start + 1000].tolist() for name in ("t", "x", "y", "p"))
        for t, x, y, p in zip(*columns, strict=True):
            store.push_back(t, x, y, bool(p))
        writer.writeEvents(store)
    return events


def _evlib(kind: str, path: str) -> Any:
    table = importlib.import_module("evlib").load_events(path).collect()
    p = table["polarity"].to_numpy()
    t = table["t"].to_physical().to_numpy() if "t" in table.columns else table["timestamp"].to_physical().to_numpy()
    return {"t": t, "x": table["x"].to_numpy(), "y": table["y"].to_numpy(), "p": p == 1}


def _tonic(kind: str, path: str) -> Any:
    io = importlib.import_module("tonic.io")
    if kind == "bin":
        return io.read_mnist_file(path, dtype=np.dtype([("x", int), ("y", int), ("t", int), ("p", int)]))
    return io.read_aedat4(path)


def _aedat(kind: str, path: str) -> Any:
    decoder = importlib.import_module("aedat").Decoder(path)
    packets = np.concatenate([packet["events"] for packet in decoder if "events" in packet])
    return {"t": packets["t"], "x": packets["x"], "y": packets["y"], "p": packets["on"]}


class _Stub(types.ModuleType):
    """A module all of whose names are itself, and that returns itself when it is called."""

    __path__: tuple[str, ...] = ()  # type: ignore[assignment]

    def __getattr__(self, name: str) -> _Stub:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **named: Any) -> _Stub:
        return self


def _spikingjelly(kind: str, path: str) -> Any:
    """Its data sets import torchaudio, whose build may not fit torch's; the two functions here do not use it."""
    for name in ("torchaudio", "torchaudio.transforms", "torchaudio.datasets"):
        sys.modules[name] = _Stub(name)
    if kind == "aedat2":
        return importlib.import_module("spikingjelly.datasets.cifar10_dvs")._load_origin_data(path)
    return importlib.import_module("spikingjelly.datasets.utils").load_aedat_v3(path)


READERS: dict[str, Callable[[str, str], Any]] = {
    "expelliarmus": _expelliarmus,
    "faery": _faery,
    "evlib": _evlib,
    "tonic": _tonic,
    "aedat": _aedat,
    "spikingjelly": _spikingjelly,
    "dv_processing": _write_aedat4,
}

if __name__ == "__main__":
    fields = {"t": np.int64, "x": np.uint16, "y": np.uint16, "p": np.uint8}
    for library, kind, path, out in zip(*(sys.argv[first::4] for first in range(1, 5)), strict=True):
        events = READERS[library](kind, path)
        columns: dict[str, Any] = {name: np.asarray(events[name]).astype(dtype) for name, dtype in fields.items()}
        np.savez(out, **columns)
