"""Events per second of each reader, in processor time of all threads; best of three.

python tests/bench/bench_event_readers.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from spikefleet_pipelines.events.readers.finding import read_recording
from spikefleet_pipelines.events.readers.reader import EventReader
from spikefleet_pipelines.events.readers.time_order import in_time_order
from spikefleet_pipelines.events.recording import EventArrays
from support import event_files as files

SENSOR = (128, 128)
Write = Callable[[Path, EventArrays], None]

FORMATS: dict[str, tuple[int, Write]] = {
    "a.dat": (4_000_000, lambda path, events: files.write_dat(path, events, SENSOR)),
    "evt2.raw": (400_000, files.write_evt2),
    "evt21.raw": (400_000, files.write_evt21),
    "evt3.raw": (400_000, files.write_evt3),
    "a.bin": (400_000, files.write_atis_bin),
    "2.aedat": (2_000_000, files.write_aedat2),
    "3.aedat": (2_000_000, lambda path, events: files.write_aedat3(path, events, packet=4096)),
    "a.aedat4": (400_000, files.write_aedat4),
    "a.npy": (4_000_000, files.write_npy),
    "a.npz": (4_000_000, files.write_npz),
    "a.mat": (2_000_000, files.write_mat),
    "a.csv": (400_000, files.write_csv),
    "a.h5": (2_000_000, files.write_hdf5),
}


def made(number: int) -> EventArrays:
    rng = np.random.default_rng(0)
    t = np.cumsum(rng.integers(0, 3, number)).astype(np.int64)
    x, y = (rng.integers(0, side, number).astype(np.uint16) for side in SENSOR)
    return EventArrays(t, x, y, rng.integers(0, 2, number).astype(np.uint8))


def measure(what: str, path: Path, walk: Callable[[EventReader], Iterable[EventArrays]] = iter) -> None:
    best, number = float("inf"), 0
    for _ in range(3):
        start = time.process_time()
        number = sum(len(chunk.t) for chunk in walk(read_recording(path)))
        best = min(best, time.process_time() - start)
    print(f"{what:32s} {number / best / 1e6:8.1f} million events/s")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, (number, write) in FORMATS.items():
            write(Path(folder) / name, made(number))
            measure(name, Path(folder) / name)
        late = made(4_000_000)
        late.t[500::500] -= 5
        files.write_dat(Path(folder) / "a.dat", late)
        measure("a.dat with late events", Path(folder) / "a.dat")
        measure("a.dat with late events, in order", Path(folder) / "a.dat", in_time_order)


if __name__ == "__main__":
    main()
