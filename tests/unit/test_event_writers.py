"""What tests write is read alike by libraries that share no code with it, and what is damaged is not.

Most libraries are not installed with the project (two are GPL): set EVENT_READERS_PYTHON to an interpreter that has
them. SpikingJelly is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spikefleet_pipelines.events.recording import EventArrays
from support import event_files as files
from support.event_files import same_events, swapped
from support.recordings import OTHER_PYTHON, other_reader, read, run_independent

SENSOR = (128, 128)
Write = Callable[[Path, EventArrays], None]

WRITERS: dict[str, tuple[str, Write]] = {
    "dat": ("a.dat", lambda path, events: files.write_dat(path, events, SENSOR)),
    "dat of old cameras": ("a.dat", lambda path, events: files.write_dat(path, events, SENSOR, kind=0)),
    "evt2": ("a.raw", lambda path, events: files.write_evt2(path, events, SENSOR)),
    "evt21": ("a.raw", lambda path, events: files.write_evt21(path, events, SENSOR)),
    "evt3": ("a.raw", lambda path, events: files.write_evt3(path, events, SENSOR)),
    "bin": ("a.bin", files.write_atis_bin),
    "aedat2": ("a.aedat", files.write_aedat2),
    "aedat3": ("a.aedat", files.write_aedat3),
    "aedat4": ("a.aedat4", files.write_aedat4),
    "aedat4 zstd": ("a.aedat4", lambda path, events: files.write_aedat4(path, events, codec="zstd")),
    "aedat4 plain": ("a.aedat4", lambda path, events: files.write_aedat4(path, events, codec=None)),
}
READ_BY = [
    ("dat", "expelliarmus"), ("dat", "faery"), ("dat of old cameras", "expelliarmus"), ("dat of old cameras", "faery"),
    ("evt2", "expelliarmus"), ("evt2", "faery"), ("evt2", "evlib"), ("evt21", "evlib"), ("evt3", "faery"),
    ("evt3", "evlib"), ("bin", "tonic"), ("aedat4", "tonic"), ("aedat4", "aedat"), ("aedat4", "faery"),
    ("aedat4 zstd", "aedat"), ("aedat4 zstd", "faery"), ("aedat4 plain", "aedat"), ("aedat4 plain", "faery"),
]  # fmt: skip


def check_alike(library: str, kinds: list[str], folder: Path) -> None:
    events = files.made_events(600, SENSOR)
    paths = {}
    for kind in kinds:
        name, write = WRITERS[kind]
        paths[kind.split()[0]] = path = folder / kind / name
        path.parent.mkdir()
        write(path, events)
    for found in other_reader(library, paths).values():
        assert same_events(found, events)
        assert not same_events(found, swapped(events))


@pytest.mark.parametrize(("kind", "library"), READ_BY)
def test_a_library_reads_what_we_write(kind: str, library: str, tmp_path: Path) -> None:
    check_alike(library, [kind], tmp_path)


@pytest.mark.slow  # another process imports torch, torchvision and all of SpikingJelly's data sets
def test_spikingjelly_reads_what_we_write(tmp_path: Path) -> None:
    check_alike("spikingjelly", ["aedat2", "aedat3"], tmp_path)


def test_aedat4_of_the_vendors_library_is_read(tmp_path: Path) -> None:
    events = files.made_events(3000, SENSOR)
    source, path = tmp_path / "source.npz", tmp_path / "a.aedat4"
    np.savez(source, t=events.t, x=events.x, y=events.y, p=events.p)
    if not OTHER_PYTHON:
        pytest.skip("set EVENT_READERS_PYTHON to an interpreter that has dv-processing")
    run_independent(OTHER_PYTHON, ["dv_processing", str(source), str(path), str(tmp_path / "out.npz")])
    found, _ = read(path)
    assert same_events(found, events)
    assert not same_events(found, swapped(events))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["f8", "i4", "u2", ">f4"])
def test_mat_of_scipy_is_read_and_scipy_reads_ours(dtype: str, packed: bool, tmp_path: Path) -> None:
    from scipy import io

    events = files.made_events(900, SENSOR, step_us=20)
    fields: dict[str, np.ndarray] = {"ts": events.t, "x": events.x, "y": events.y, "pol": events.p}
    others: dict[str, object] = {
        "note": "text",
        "nested": {"a": 1},
        "cells": np.array(["a", 1], object),
        "z": 1j,
        "pad": np.int8(3),
    }
    columns = {name: values.astype(dtype)[:, None] for name, values in fields.items()}
    io.savemat(tmp_path / "a.mat", {**others, **columns}, do_compression=packed)
    assert same_events(read(tmp_path / "a.mat")[0], events)
    files.write_mat(tmp_path / "b.mat", events)
    loaded = io.loadmat(tmp_path / "b.mat")
    assert all(np.array_equal(np.ravel(loaded[name]), values) for name, values in fields.items())
    for one in (1, 3):  # numbers in the tags of their elements
        short = files.part(events, 0, one)
        io.savemat(tmp_path / "c.mat", {name: values[:one].astype("u1") for name, values in fields.items()})
        assert len(read(tmp_path / "c.mat")[0].t) == len(short.t)
